"""Measures of overlap between two sets, and two rankings, of the same items."""

from __future__ import annotations

import math

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
    """Rank-biased overlap of two rankings by [item] scores of 0 and more, extrapolated (Webber et al. 2010, eq. 32).

    A score of 0 ranks nothing, and the shorter ranking says how deep both are compared; equal scores have the first of
    their ranks (section 4.2.4 there). NaN where one ranks nothing.

    Args:
        p: how fast the weight falls with depth; the first 1/(1−p) items carry most of it.

    >>> scores = torch.tensor([3.0, 2.0, 1.0])
    >>> round(rank_biased(scores, scores), 6), rank_biased(scores, scores.flip(0)) < 1
    (1.0, True)
    >>> rank_biased(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    0.0
    """
    ranks = [_first_ranks(scores) for scores in (a, b)]
    depths = min(int((scores > 0).sum()) for scores in (a, b))
    if not depths:
        return math.nan
    depth = torch.arange(1, depths + 1)
    shared, *sizes = (
        torch.bincount(each[each < depths], minlength=depths).cumsum(0).double()
        for each in (torch.maximum(*ranks), *ranks)
    )
    agreement = 2 * shared / (sizes[0] + sizes[1])
    weights = p ** depth.double()
    return float(agreement[-1] * weights[-1] + (1 - p) / p * (weights * agreement).sum())


def _first_ranks(scores: Tensor) -> Tensor:
    """[item] how many items have a higher score; of a score of 0 as many as there are items."""
    ranks = len(scores) - torch.searchsorted(scores.sort().values, scores, right=True)
    return ranks.masked_fill(scores <= 0, len(scores))


def weighted_jaccard(a: Tensor, b: Tensor) -> float:
    """Σ min / Σ max of two [item] weights that are first made to add up to 1; 0 where one of them is all zero.

    >>> weighted_jaccard(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]))
    1.0
    """
    if not float(a.sum()) > 0 or not float(b.sum()) > 0:
        return 0.0
    x, y = a / a.sum(), b / b.sum()
    return float(torch.minimum(x, y).sum() / torch.maximum(x, y).sum())


def top_weights(scores: Tensor, n: int, falling: Tensor | None = None) -> Tensor:
    """[item] membership of the `n` highest of [item] scores, which equal scores at the border share.

    Args:
        falling: the scores from the highest to the lowest, where they have been sorted already.

    >>> top_weights(torch.tensor([3.0, 1.0, 1.0, 0.0]), 2).tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    border = (scores.sort(descending=True).values if falling is None else falling)[n - 1]
    above, tied = scores > border, scores == border
    return above.double() + tied.double() * (n - int(above.sum())) / int(tied.sum())
