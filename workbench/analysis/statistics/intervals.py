"""Intervals of what is computed from examples: by theory where there is one, else by drawing the examples anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_DRAWS = 1_000_000
"""Of a bootstrap, that a result's file may ask for."""


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


def draw_weights(n: int, n_bootstrap: int, seed: int) -> Tensor:
    """[draw, example] how often each example is in each draw, over n: a mean over a draw is a product with these."""
    index = torch.stack(draws(n, n_bootstrap, seed))
    return torch.zeros(n_bootstrap, n, dtype=torch.float64).scatter_add_(
        1, index, torch.full(index.shape, 1 / n, dtype=torch.float64)
    )


def percentiles(samples: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """The middle `level` of samples [draw, ...], as order statistics; NaN draws are left out, NaN where all are.

    Order statistics, and not numbers between them, because samples may be infinite.

    >>> low, high = percentiles(torch.arange(101.0))
    >>> float(low), float(high)
    (2.0, 98.0)
    """
    ordered = samples.sort(0).values  # NaN comes last
    last = (~samples.isnan()).sum(0, keepdim=True) - 1
    cut = ((1 - level) / 2 * last.clamp_min(0) + 1e-9).long()
    low, high = (ordered.gather(0, at.clamp_min(0)).squeeze(0) for at in (cut, last - cut))
    return low, high


def mean_intervals(values: Tensor, *, n_bootstrap: int = 1000, level: float = 0.95, seed: int = 0) -> Tensor:
    """[..., 2] bootstrap intervals of means over the examples of [example, ...], where NaN is left out.

    The same examples are drawn for every column. NaN where fewer than two examples have a number.

    >>> mean_intervals(torch.tensor([[1.0, 2.0], [1.0, torch.nan]])).tolist()
    [[1.0, 1.0], [nan, nan]]
    """
    flat = values.double().flatten(1)
    known = flat.isfinite()
    if len(values) < 2:
        return torch.full((*values.shape[1:], 2), torch.nan, dtype=torch.float64)
    weights = draw_weights(len(values), n_bootstrap, seed)
    means = (weights @ flat.masked_fill(~known, 0.0)) / (weights @ known.double())  # of a draw without any, 0 / 0
    ends = torch.stack(percentiles(means, level), -1)
    ends[known.sum(0) < 2] = torch.nan
    return ends.reshape(*values.shape[1:], 2)


def mean_t(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of [example]; NaN with one example.

    >>> mean_t(torch.tensor([1.0, 2.0, 3.0]))
    (-0.48..., 4.48...)
    """
    low, high = means_t(values, level).tolist()
    return low, high


def means_t(values: Tensor, level: float = 0.95) -> Tensor:
    """[..., 2] Student's t intervals of the means over the last axis of [..., example]; NaN of one example."""
    n, values = values.shape[-1], values.double()
    if n < 2:
        return torch.full((*values.shape[:-1], 2), torch.nan, dtype=torch.float64)
    mean, wide = values.mean(-1), _t(n, level) * values.std(-1) / n**0.5
    return torch.stack([mean - wide, mean + wide], -1)


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
    """Fieller's interval of mean(part) / mean(whole) of [example] pairs: NaN where it is not bounded, or below two.

    It holds each share f for which the mean of part − f · whole is within its t interval of 0, and is bounded exactly
    where the t interval of the whole's mean does not hold 0.

    >>> whole = torch.tensor([1.0, 2.0, 3.0, 2.0])
    >>> low, high = share_interval(whole / 2, whole)
    >>> round(low, 6), round(high, 6), share_interval(whole, whole - 2)
    (0.5, 0.5, (nan, nan))
    """
    n, (a, d) = len(part), (given.double() for given in (part, whole))
    nothing = (float("nan"), float("nan"))
    if n < 2:
        return nothing
    (aa, ad), (_, dd) = (torch.cov(torch.stack([a, d])) / n).tolist()
    t2, x, y = _t(n, level) ** 2, float(a.mean()), float(d.mean())
    first, half, last = y * y - t2 * dd, x * y - t2 * ad, x * x - t2 * aa
    if not first > 0:
        return nothing
    root = max(0.0, half * half - first * last) ** 0.5
    return (half - root) / first, (half + root) / first


def _t(n: int, level: float) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, n - 1))
