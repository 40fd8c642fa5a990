"""Intervals of what is computed from examples: by drawing the examples anew, and by percentiles of any draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def draws(n: int, n_bootstrap: int, seed: int, groups: Sequence[object] | None = None) -> list[Tensor]:
    """Indices of examples drawn with replacement; whole groups (such as paraphrases of one template) where given."""
    generator = torch.Generator().manual_seed(seed)
    if groups is None:
        return list(torch.randint(n, (n_bootstrap, n), generator=generator))
    names = list(dict.fromkeys(groups))
    members = [torch.tensor([i for i, group in enumerate(groups) if group == name]) for name in names]
    several = torch.randint(len(names), (n_bootstrap, len(names)), generator=generator)
    return [torch.cat([members[i] for i in one]) for one in several.tolist()]


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


def interval(
    statistic: Callable[[Tensor], float], n: int, *, n_bootstrap: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of a statistic of examples, given as `statistic(indices)`; NaN draws are left out.

    >>> values = torch.arange(100.0)
    >>> low, high = interval(lambda index: float(values[index].mean()), 100)
    >>> low < 49.5 < high
    True
    """
    found = torch.tensor([statistic(index) for index in draws(n, n_bootstrap, seed)], dtype=torch.float64)
    low, high = percentiles(found, level)
    return float(low), float(high)


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
    n, mean = len(values), float(values.double().mean())
    if n < 2:
        return float("nan"), float("nan")
    wide = _t(n, level) * float(values.double().std()) / n**0.5
    return mean - wide, mean + wide


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
