"""Intervals of what is computed from examples, one home for all analyses.

docs/simulations.md shows how often each holds what it is of; benchmarks/simulations.py has a row for each, and for
each place that prints one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor


def draws(
    n: int, n_bootstrap: int, seed: int, groups: Sequence[object] | None = None, share: float = 1.0
) -> list[Tensor]:
    """Indices of examples drawn with replacement; whole groups (such as paraphrases of one template) where given.

    Args:
        share: how many are drawn, of all there are.
    """
    generator = torch.Generator().manual_seed(seed)
    if groups is None:
        return list(torch.randint(n, (n_bootstrap, max(1, int(share * n))), generator=generator))
    members = _members(n, groups)
    size = max(1, int(share * len(members)))
    several = torch.randint(len(members), (n_bootstrap, size), generator=generator)
    return [torch.cat([members[i] for i in one]) for one in several.tolist()]


def halves(n: int, times: int, seed: int, groups: Sequence[object] | None = None) -> list[tuple[Tensor, Tensor]]:
    """Indices of two halves of the examples, or of the groups, that share none; anew each time."""
    generator = torch.Generator().manual_seed(seed)
    members = _members(n, groups)
    half = len(members) // 2
    orders = [torch.randperm(len(members), generator=generator).tolist() for _ in range(times if half else 0)]
    return [
        (torch.cat([members[i] for i in one[:half]]), torch.cat([members[i] for i in one[half : 2 * half]]))
        for one in orders
    ]


def _members(n: int, groups: Sequence[object] | None) -> list[Tensor]:
    """Indices of the examples of each group; of each alone without groups."""
    names = range(n) if groups is None else list(dict.fromkeys(groups))
    own = range(n) if groups is None else groups
    places: dict[object, list[int]] = {name: [] for name in names}
    for i, name in enumerate(own):
        places[name].append(i)
    return [torch.tensor(each) for each in places.values()]


SEEN_FROM = 8
"""Examples from which on a sample can show that few of them carry its mean."""
_ROUNDING = 1e-12  # of the largest example: what is smaller is how numbers are rounded


def mean_t(values: Tensor, level: float = 0.95, checked: bool = True) -> tuple[float, float]:
    """`means_t` of one [example].

    >>> mean_t(torch.tensor([1.0, 2.0, 3.0]))
    (-0.48..., 4.48...)
    """
    low, high = means_t(values, level, checked).tolist()
    return low, high


def means_t(values: Tensor, level: float = 0.95, checked: bool = True) -> Tensor:
    """[..., 2] Student's t intervals of the means over the last axis of [..., example], where NaN is left out.

    NaN where fewer than two examples have a number, and where `carried_by_few` says that the interval would not hold
    what it promises.

    Args:
        checked: False for whether a mean is above 0 where that must be told, and for what is bounded and saturates.

    >>> means_t(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, torch.nan], [1.0, torch.nan, torch.nan]])).tolist()
    [[-0.48..., 4.48...], [1.0, 1.0], [nan, nan]]
    >>> means_t(torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 9])).tolist()
    [nan, nan]
    """
    known, values = values.isfinite(), values.double()
    n = known.sum(-1)
    mean = values.masked_fill(~known, 0.0).sum(-1) / n
    square = (values - mean[..., None]).masked_fill(~known, 0.0).square().sum(-1)
    wide = _t(n, level) * (square / (n - 1).clamp_min(1) / n).sqrt()
    ends = torch.stack([mean - wide, mean + wide], -1)
    return ends.masked_fill(carried_by_few(values)[..., None], torch.nan) if checked else ends


def carried_by_few(values: Tensor) -> Tensor:
    """[...] whether so few of the examples carry the spread over the last axis that a t interval is not to be trusted.

    Of n examples at distances d from their median (Σ|d|)² / Σd² carry it (`effective_examples`; over n that is the
    square of Geary's ratio): 0.64 n of normal ones, 0.48 n of exponential ones, as many as there are of those that
    alone stand out. Too few are less than 0.38 n, and of more than 24 less than 1.1 n^⅔, since more examples even out
    more. The rest of what such examples are drawn from is likely to hold some that are larger yet, and nothing shows
    on which side. docs/simulations.md has how often this speaks, and how often an interval is shown that is wrong.

    Fewer than `SEEN_FROM` examples show nothing. What none of them is like, no sample shows: of a kind that is rarer
    than 3 in n, more than one sample in twenty has none.

    Args:
        values: [..., example]; what is not finite is left out.

    >>> even, few = torch.arange(24.0), torch.arange(24.0).exp()
    >>> carried_by_few(torch.stack([even, few])).tolist()
    [False, True]
    """
    known = values.isfinite()
    n = known.sum(-1).double()
    around = values.double().masked_fill(~known, torch.nan)
    around = (around - around.nanmedian(-1, keepdim=True).values).masked_fill(~known, 0.0)
    size = values.double().masked_fill(~known, 0.0).abs().amax(-1, keepdim=True)
    around = around.masked_fill(around.abs() <= _ROUNDING * size, 0.0)
    found = effective_examples(around)
    return (n >= SEEN_FROM) & (found > 0) & (found < torch.minimum(0.38 * n, 1.1 * n.pow(2 / 3)))


def bracketed(low: float, high: float, form: str = ".3g") -> str:
    """An interval in brackets, or that there is none.

    >>> bracketed(-1, 2), bracketed(torch.nan, torch.nan)
    ('[-1, 2]', '[no interval]')
    """
    return f"[{low:{form}}, {high:{form}}]" if low == low else "[no interval]"


def without_interval(ends: Tensor, n: int) -> str:
    """What to say of those of `means_t` [..., 2] of n examples that have none; "" if all have one, or n is too small.

    >>> without_interval(torch.tensor([[0.0, 1.0], [torch.nan, torch.nan]]), 24)
    '; no interval of 1 of 2 means, which few examples carry'
    """
    none = int(ends[..., 0].isnan().sum())
    if not none or n < SEEN_FROM:
        return ""
    return f"; no interval of {none:,} of {ends[..., 0].numel():,} means, which few examples carry"


def proportions(right: Tensor, level: float = 0.95) -> Tensor:
    """[..., 2] intervals of the chance of a 1, from [..., example] of 0 and 1: exact (Clopper and Pearson), so never
    narrower than promised.

    >>> proportions(torch.ones(10)).tolist()
    [0.69..., 1.0]
    """
    from scipy.stats import beta

    n, hits = right.shape[-1], right.double().sum(-1).numpy()
    low = torch.as_tensor(beta.ppf((1 - level) / 2, hits, n - hits + 1)).nan_to_num(0.0)
    high = torch.as_tensor(beta.ppf((1 + level) / 2, hits + 1, n - hits)).nan_to_num(1.0)
    return torch.stack([low, high], -1)


def jackknife_t(found: Tensor, without: Tensor, level: float = 0.95) -> Tensor:
    """[..., 2] intervals of a smooth function of examples, by what it is without each of them.

    Args:
        found: [...] of all examples. without: [..., example] of all but one.

    >>> x = torch.tensor([1.0, 2.0, 6.0])
    >>> torch.equal(jackknife_t(x.mean(), (x.sum() - x) / 2), means_t(x))
    True
    """
    n, found, without = without.shape[-1], found.double(), without.double()
    if n < 2:
        return torch.full((*found.shape, 2), torch.nan, dtype=torch.float64)
    spread = (without - without.mean(-1, keepdim=True)).square().sum(-1)
    wide = _t(n, level) * (spread * (n - 1) / n).sqrt()
    return torch.stack([found - wide, found + wide], -1)


def drawn_t(found: Tensor, drawn: Tensor, n: int, level: float = 0.95) -> Tensor:
    """[..., 2] t intervals around what was found, as wide as draws of the examples spread; NaN draws are left out.

    Of what depends on which items are chosen, such as the overlap of two circuits, neither the draws' own percentiles
    nor their mirror image hold what all examples there could be would give: draws choose with more noise. The interval
    is of the mean of what is found with as many new examples, around which `found` lies.

    Args:
        found: [...]. drawn: [draw, ...] with the examples drawn anew. n: how many examples there are.
    """
    wide = _t(n, level) * _spread(drawn.double())
    return torch.stack([found.double() - wide, found.double() + wide], -1)


def _spread(drawn: Tensor) -> Tensor:
    """[...] standard deviation over the first axis, NaN left out."""
    known = drawn.isfinite()
    n = known.sum(0)
    mean = drawn.masked_fill(~known, 0.0).sum(0) / n
    square = (drawn - mean).masked_fill(~known, 0.0).square().sum(0)
    return torch.where(n > 1, (square / (n - 1).clamp_min(1)).sqrt(), torch.nan)


def rank_correlation(rho: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of Spearman's ρ of n pairs, by Fisher's z with the error of Bonett and Wright (2000).

    (−1, 1) of fewer than four pairs, which say nothing.

    >>> rank_correlation(0.0, 3), [round(end, 3) for end in rank_correlation(0.5, 30)]
    ((-1.0, 1.0), [0.148, 0.74])
    """
    from scipy.special import ndtri

    if n < 4:
        return -1.0, 1.0
    z, wide = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho))), float(ndtri((1 + level) / 2))
    wide *= ((1 + rho * rho / 2) / (n - 3)) ** 0.5
    return min(rho, math.tanh(z - wide)), max(rho, math.tanh(z + wide))


def medians(values: Tensor, level: float = 0.95) -> Tensor:
    """[..., 3] medians over the last axis of [..., example], and intervals by order statistics, whatever the tails.

    The interval goes between the narrowest two examples, equally far from both ends, that hold the median with at least
    this probability; NaN where there are too few examples for it.

    >>> medians(torch.arange(9.0)).tolist()
    [4.0, 1.0, 7.0]
    """
    from scipy.stats import binom

    ordered = values.double().sort(-1).values
    n = ordered.shape[-1]
    cut = int(binom.ppf((1 - level) / 2, n, 0.5))  # as many examples lie below the lower end
    if binom.cdf(cut - 1, n, 0.5) > (1 - level) / 2 or cut < 1:
        ends = [torch.full_like(ordered[..., 0], torch.nan)] * 2
    else:
        ends = [ordered[..., cut - 1], ordered[..., n - cut]]
    middle = (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2
    return torch.stack([middle, *ends], -1)


def effective_examples(values: Tensor) -> Tensor:
    """[...] how many examples carry the sum over the last axis, (Σ|e|)² / Σe²: n where all weigh the same, 1 where one
    is all of it; 0 where all are 0.

    >>> effective_examples(torch.tensor([[1.0, -1.0], [5.0, 0.0], [0.0, 0.0]])).tolist()
    [2.0, 1.0, 0.0]
    """
    sizes = values.double().abs()
    return sizes.sum(-1) ** 2 / sizes.square().sum(-1).clamp_min(1e-300)


def share_interval(part: Tensor, whole: Tensor, level: float = 0.95) -> tuple[float, float]:
    """`share_intervals` of one [example].

    >>> whole = torch.tensor([1.0, 2.0, 3.0, 2.0])
    >>> low, high = share_interval(whole / 2, whole)
    >>> round(low, 6), round(high, 6), share_interval(whole, whole - 2)
    (0.5, 0.5, (nan, nan))
    """
    low, high = share_intervals(part, whole, level).tolist()
    return low, high


def share_intervals(part: Tensor, whole: Tensor, level: float = 0.95) -> Tensor:
    """[..., 2] Fieller's intervals of mean(part) / mean(whole), of [..., example] and [example] of the same examples.

    NaN where one is not bounded, or of fewer than two. It holds each share f for which the mean of part − f · whole is
    within its t interval of 0, and is bounded exactly where the t interval of the whole's mean does not hold 0.
    """
    n, (a, d) = part.shape[-1], (given.double() for given in (part, whole))
    if n < 2:
        return torch.full((*part.shape[:-1], 2), torch.nan, dtype=torch.float64)
    x, y = a.mean(-1), d.mean()
    over_a, over_d = a - x[..., None], d - y
    aa, ad, dd = ((one * other).sum(-1) / (n * (n - 1)) for one, other in (
        (over_a, over_a), (over_a, over_d), (over_d, over_d)
    ))  # fmt: skip
    t2 = _t(n, level) ** 2
    first, half, last = y * y - t2 * dd, x * y - t2 * ad, x * x - t2 * aa
    root = (half * half - first * last).clamp_min(0).sqrt()
    ends = torch.stack([(half - root) / first, (half + root) / first], -1)
    return ends if bool(first > 0) else torch.full_like(ends, torch.nan)


def middle(drawn: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """The ends between which the middle of draws [draw, ...] lies, of what chance gives: not of something measured.

    As order statistics; NaN draws are left out, NaN where all are.

    >>> low, high = middle(torch.arange(101.0))
    >>> float(low), float(high)
    (2.0, 98.0)
    """
    ordered = drawn.sort(0).values  # NaN comes last
    last = (~drawn.isnan()).sum(0, keepdim=True) - 1
    cut = ((1 - level) / 2 * last.clamp_min(0) + 1e-9).long()
    low, high = (ordered.gather(0, at.clamp_min(0)).squeeze(0) for at in (cut, last - cut))
    return low, high


@overload
def _t(n: int, level: float) -> float: ...


@overload
def _t(n: Tensor, level: float) -> Tensor: ...


def _t(n: int | Tensor, level: float) -> float | Tensor:
    """Student's t of n examples at which `level` lies between −t and t; NaN of fewer than two."""
    # `scipy.stats.t` asks it too, after an import that takes five times as long.
    from scipy.special import stdtrit

    if isinstance(n, Tensor):
        return torch.as_tensor(stdtrit(n.numpy() - 1.0, (1 + level) / 2))
    return float(stdtrit(n - 1, (1 + level) / 2))
