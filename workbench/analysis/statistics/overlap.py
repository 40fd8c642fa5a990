"""Measures of overlap between two sets, and two rankings, of the same items."""

from __future__ import annotations

import torch
from torch import Tensor


def jaccard(a: Tensor, b: Tensor) -> float:
    """|A∩B| / |A∪B| of two [item] bools; 1 for two empty sets.

    >>> jaccard(torch.tensor([True, True, False]), torch.tensor([False, True, True]))
    0.3333333333333333
    """
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def rank_biased(a: Tensor, b: Tensor, p: float = 0.9) -> float:
    """Rank-biased overlap of two rankings by [item] scores, extrapolated to their end (Webber et al. 2010, eq. 32).

    Args:
        p: how fast the weight falls with depth; the first 1/(1−p) items carry most of it.

    >>> scores = torch.tensor([3.0, 2.0, 1.0])
    >>> round(rank_biased(scores, scores), 6), rank_biased(scores, scores.flip(0)) < 1
    (1.0, True)
    """
    first, second = (scores.argsort(descending=True, stable=True).tolist() for scores in (a, b))
    seen_a: set[int] = set()
    seen_b: set[int] = set()
    total, shared = 0.0, 0
    for depth, (x, y) in enumerate(zip(first, second, strict=True), start=1):
        seen_a.add(x)
        seen_b.add(y)
        shared += (x in seen_b) + (y in seen_a and y != x)
        total += p**depth * shared / depth
    n = len(first)
    return shared / n * p**n + (1 - p) / p * total


def weighted_jaccard(a: Tensor, b: Tensor) -> float:
    """Σ min / Σ max of two [item] weights that are first made to add up to 1; 0 where one of them is all zero.

    >>> weighted_jaccard(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]))
    1.0
    """
    if not float(a.sum()) > 0 or not float(b.sum()) > 0:
        return 0.0
    x, y = a / a.sum(), b / b.sum()
    return float(torch.minimum(x, y).sum() / torch.maximum(x, y).sum())


def top_weights(scores: Tensor, n: int) -> Tensor:
    """[item] membership of the `n` highest of [item] scores, which equal scores at the border share.

    >>> top_weights(torch.tensor([3.0, 1.0, 1.0, 0.0]), 2).tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    border = scores.sort(descending=True).values[n - 1]
    above, tied = scores > border, scores == border
    return above.double() + tied.double() * (n - int(above.sum())) / int(tied.sum())
