"""Compare a capture with the attentions that the same model returns in eager mode."""

from typing import Any

import torch

from workbench.capture import Capture
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


def assert_equal_to_eager(capture: Capture, eager: Any, outputs: dict[str, tuple[str, str]]) -> int:
    """Every site's statistics equal the dense definitions on the eager attentions; returns how many were compared."""
    compared = 0
    for field, (tower, kind) in outputs.items():
        sites = [site for site in capture.sites if site.kind == kind and site.tower == tower]
        attentions = eager[field]
        assert len(sites) == len(attentions) > 0, f"{field}: {len(sites)} sites, {len(attentions)} eager layers"
        for site, attention in zip(sites, attentions, strict=True):
            seen = capture[site.name]
            mask: Mask = seen.pattern.mask
            alive = (seen.pattern.seen.keys_per_query > 0).expand(seen.shape[:3])
            # Eager attention spreads a row that sees no key over all keys; for us it has no distribution.
            truth = torch.where(alive[..., None], attention.double(), 0.0)
            names = names_for(kind)
            want = dense(truth, names, mask, options=Options(block=16))
            for name in names:
                got, expected = getattr(seen, name).double(), want[name]
                torch.testing.assert_close(
                    got,
                    expected,
                    atol=ABSOLUTE.get(name, 1e-5),
                    rtol=RELATIVE.get(name, 0.0),
                    equal_nan=True,
                    msg=f"{site.name} {name}: off by {(got - expected).abs().nan_to_num(0.0).max():.1e}",
                )
            torch.testing.assert_close(seen.pattern.dense().double(), truth, atol=1e-5, rtol=1e-5)
            compared += 1
    return compared
