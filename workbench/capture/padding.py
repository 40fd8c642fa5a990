"""Which tokens of a batch are padding, and statistics over the others alone.

A query that is padding mostly sees keys like any other, and a model computes its row. Means over a prompt's tokens
leave it out, so that they are those that the prompt has alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.capture.site_capture import SiteCapture
from workbench.kernels.masks import hidden_below
from workbench.kernels.patterns import Pattern
from workbench.kernels.statistics import STATISTICS, VALUE_WEIGHTED

_ROWS = 64  # queries whose weights are held at a time


def padding_of(capture: SiteCapture) -> Tensor | None:
    """[batch or 1, position] bool: tokens of a self-attention that no query sees; None where there are none.

    None also where the pattern was not kept, and where tokens do not see themselves, so that this does not tell.
    """
    pattern = capture.lazy
    mask = getattr(pattern, "mask", None)
    overwritten = any(tensor._version != seen for tensor, seen in capture.held)
    if pattern is None or mask is None or mask.tensor is None or overwritten or capture.site.kind != "self":
        return None
    if pattern.n_queries != pattern.n_keys:
        return None
    unseen = pattern.seen.queries_per_key.amax(1) == 0
    if not bool(unseen.any()) or bool(unseen.all(1).any()):
        return None
    if mask.tensor.shape[-2] > 1 and mask.tensor.shape[-1] > 1:
        own = mask.tensor.diagonal(dim1=-2, dim2=-1)
        shown = own > hidden_below(own.dtype) if mask.additive else own
        if bool((~shown & ~unseen[:, None].to(shown.device)).any()):
            return None
    return unseen


def without_padding(capture: SiteCapture, name: str) -> Tensor:
    """A statistic [batch, head, position] in which padding does not count: NaN there, and not in what is received."""
    values: Tensor = getattr(capture, name)
    record = STATISTICS.get(name.removeprefix(VALUE_WEIGHTED))
    if values.dim() != 3 or record is None or record.axes not in ("query", "key"):
        return values
    gone = padding_of(capture)
    if gone is None or gone.shape[1] != values.shape[-1]:
        return values
    gone = gone.to(values.device)
    if record.axes == "key" and record.name in ("received", "received_mean"):
        assert capture.lazy is not None
        pattern = capture.lazy.value_weighted() if name.startswith(VALUE_WEIGHTED) else capture.lazy
        values = _received(pattern, values.double(), gone, mean=record.name == "received_mean")
    return values.double().masked_fill(gone[:, None], torch.nan)


def _received(pattern: Pattern, values: Tensor, gone: Tensor, *, mean: bool) -> Tensor:
    """What keys receive, less what they receive from rows that are gone."""
    seen = pattern.seen.queries_per_key.to(values)
    total = values * seen if mean else values.clone()
    places = gone.any(0).nonzero()[:, 0].tolist()
    for start in range(0, len(places), _ROWS):
        some = places[start : start + _ROWS]
        theirs = gone[:, None, some, None].to(values)
        total = total - (pattern.rows(some).to(values) * theirs).sum(2)
        if mean:
            every = slice(0, pattern.n_keys)
            for at, its in zip(some, theirs.unbind(2), strict=True):
                sees = pattern.mask.visible(slice(at, at + 1), every, slice(None), slice(0, pattern.n_heads))
                seen = seen - its * (1.0 if sees is None else sees[:, :, 0].to(values))
    return total / seen if mean else total
