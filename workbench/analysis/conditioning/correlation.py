"""Rank correlation with a bootstrap interval, for quantities of heads and for curves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def ranks(x: Tensor) -> Tensor:
    """Ranks along the last axis, from 0; equal numbers share their mean rank.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0]))
    tensor([1.5000, 0.0000, 1.5000], dtype=torch.float64)
    """
    below = (x[..., None, :] < x[..., :, None]).sum(-1)
    equal = (x[..., None, :] == x[..., :, None]).sum(-1)
    return below.double() + (equal.double() - 1) / 2


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Correlation along the last axis; 0 where one of them does not vary, which is no evidence of a relation."""
    x, y = x.double() - x.double().mean(-1, keepdim=True), y.double() - y.double().mean(-1, keepdim=True)
    scale = ((x * x).sum(-1) * (y * y).sum(-1)).sqrt()
    return torch.where(scale > 1e-12, (x * y).sum(-1) / scale.clamp(min=1e-300), 0.0)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of the ranks along the last axis."""
    return pearson(ranks(x), ranks(y))


def correlations(
    quantities: Mapping[str, Tensor], scores: Tensor, resamples: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """Spearman's ρ of each quantity [row] with the scores [row], and its 95 % interval over rows drawn anew.

    Rows without a score (NaN) are left out. With fewer than three rows there is no relation to speak of: (0, −1, 1).
    """
    known = scores.isfinite()
    y = scores[known]
    if len(y) < 3:
        return dict.fromkeys(quantities, (0.0, -1.0, 1.0))
    picked = torch.randint(len(y), (resamples, len(y)), generator=torch.Generator().manual_seed(seed))
    found = {}
    for name, values in quantities.items():
        x = values.double()[known]
        again = spearman(x[picked], y[picked]).sort().values
        cut = int(0.025 * (resamples - 1))
        found[name] = (float(spearman(x, y)), float(again[cut]), float(again[resamples - 1 - cut]))
    return found
