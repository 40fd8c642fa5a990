"""Bootstrap intervals over examples."""

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


def interval(
    statistic: Callable[[Tensor], float], n: int, *, n_bootstrap: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a statistic of examples, given as `statistic(indices)`; NaN draws are left out.

    >>> values = torch.arange(100.0)
    >>> low, high = interval(lambda index: float(values[index].mean()), 100)
    >>> low < 49.5 < high
    True
    """
    found = torch.tensor([statistic(index) for index in draws(n, n_bootstrap, seed)], dtype=torch.float64)
    found = found[~found.isnan()]
    if not len(found):
        return float("nan"), float("nan")
    low, high = torch.quantile(found, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high
