"""Compare a capture with the attentions that a copy of the model computed in plain matrix products."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.capture.capture import Capture
from workbench.capture.site_capture import SiteCapture
from workbench.kernels.masks import Mask
from workbench.kernels.statistics import STATISTICS, Options, dense

ROWS = ["entropy", "peak", "effective_keys", "distance", "distance_var", "sink", "current", "previous"]
COLUMNS = ["received", "pooled_max", "pooled_mean"]
# Masses hold to 1e-5 and entropy to 1e-4; what counts keys or tokens can be thousands, and holds to 1e-4 of its size.
ABSOLUTE = {"entropy": 1e-4, "distance": 1e-4, "distance_var": 1e-3}
RELATIVE = {"received": 1e-4, "distance": 1e-4, "distance_var": 1e-4, "effective_keys": 1e-4}


def names_for(kind: str) -> list[str]:
    """The statistics that exist for a kind of site."""
    return [name for name in (*ROWS, *COLUMNS) if kind != "cross" or not STATISTICS[name].positional]


def assert_equal_to_eager(
    capture: Capture, eager: Any, outputs: dict[str, tuple[str, str]], layers: Mapping[str, Sequence[int]] | None = None
) -> int:
    """Every site's statistics equal the dense definitions on the eager attentions; returns how many were compared.

    Args:
        layers: of which of the eager output's fields only these layers are compared, where maps are large.
    """
    compared = 0
    for field, (tower, kind) in outputs.items():
        sites = [site for site in capture.sites if site.kind == kind and site.tower == tower]
        attentions = eager[field]
        assert len(sites) == len(attentions) > 0, f"{field}: {len(sites)} sites, {len(attentions)} eager layers"
        for layer in (layers or {}).get(field, range(len(sites))):
            _assert_site(capture[sites[layer].name], attentions[layer])
            compared += 1
    return compared


def _assert_site(seen: SiteCapture, attention: Tensor) -> None:
    mask: Mask = seen.pattern.mask
    alive = (seen.pattern.seen.keys_per_query > 0).expand(seen.shape[:3])
    assert alive.double().mean() >= 0.5, f"{seen.site.name}: most rows see no key"
    # Eager attention spreads a row that sees no key over all keys; for us it has no distribution.
    truth = torch.where(alive[..., None], attention.double(), 0.0)
    hidden = _hidden(mask, seen.shape)
    assert not truth[hidden].any(), f"{seen.site.name}: a key that the model sees is hidden"
    unused = (attention == 0) & ~hidden & ~_nearly_hidden(mask, seen.shape) & alive[..., None]
    assert not unused.all(1).any(), f"{seen.site.name}: a key that no head of the model sees is shown"
    names = names_for(seen.site.kind)
    want = dense(truth, names, mask, options=Options(block=16))
    for name in names:
        got, expected = getattr(seen, name).double(), want[name]
        torch.testing.assert_close(
            got,
            expected,
            atol=ABSOLUTE.get(name, 1e-5),
            rtol=RELATIVE.get(name, 0.0),
            equal_nan=True,
            msg=f"{seen.site.name} {name}: off by {(got - expected).abs().nan_to_num(0.0).max():.1e}",
        )
    torch.testing.assert_close(seen.pattern.dense().double(), truth, atol=1e-5, rtol=1e-5)
    sums = truth.sum(-1)[alive]
    if seen.pattern.normalised:
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
    else:  # sink logits take the rest
        assert (sums <= 1 + 1e-6).all()


def _hidden(mask: Mask, shape: tuple[int, int, int, int]) -> Tensor:
    """[batch, head, query, key] of the keys that the pattern says cannot be seen."""
    b, h, q, k = (slice(0, n) for n in shape)
    hidden = torch.zeros(shape, dtype=torch.bool)
    rule, visible = mask.rule(q, k, hidden.device), mask.visible(q, k, b, h)
    if rule is not None:
        hidden |= ~rule
    if visible is not None:
        hidden |= ~visible
    return hidden


def _nearly_hidden(mask: Mask, shape: tuple[int, int, int, int]) -> Tensor:
    """Keys whose score is lowered so far that nothing is left: Swin writes -100 between parts of a window."""
    if mask.tensor is None or not mask.additive:
        return torch.zeros(shape, dtype=torch.bool)
    return (mask.tensor < -90).expand(shape)
