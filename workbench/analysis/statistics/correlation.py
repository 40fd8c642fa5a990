"""Correlation, by numbers and by ranks; and how well scores rank a reference set."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import InterventionError, WorkbenchError


def ranks(x: Tensor) -> Tensor:
    """Ranks along the last axis, from 0; equal numbers share their mean rank.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(x.detach().cpu().numpy(), axis=-1)) - 1


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Correlation along the last axis, in float64; NaN where one of them does not vary.

    >>> pearson(torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]]), torch.tensor([2.0, 4.0, 8.0]))
    tensor([1.0000,    nan], dtype=torch.float64)
    """
    x, y = (given.double() - given.double().mean(-1, keepdim=True) for given in (x, y))
    varies = [given.norm(dim=-1) > 1e-12 * (1 + given.abs().amax(-1)) for given in (x, y)]
    scale = x.norm(dim=-1) * y.norm(dim=-1)
    found = ((x * y).sum(-1) / scale.clamp_min(1e-300)).clamp(-1, 1)
    return found.masked_fill(~(varies[0] & varies[1]), torch.nan)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of the ranks along the last axis; NaN where one of them does not vary."""
    return pearson(ranks(x), ranks(y))


def correlation(x: Tensor, y: Tensor, measure: str) -> float:
    """Of two [item]; NaN where one of them does not vary.

    Args:
        measure: "pearson" or "spearman".

    Raises:
        WorkbenchError: another measure.
    """
    if measure not in ("pearson", "spearman"):
        raise WorkbenchError(f'measure is "pearson" or "spearman", not {measure!r}')
    return float(pearson(x, y) if measure == "pearson" else spearman(x, y))


def rank_auroc(scores: Tensor, real: Tensor) -> float:
    """Area under the ROC curve: the probability that a real item scores higher than another one; ties count half.

    Args:
        scores: [item]. real: [item] bool.

    Raises:
        InterventionError: all items are real, or none.

    >>> rank_auroc(torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([True, True, False, False]))
    0.875
    """
    n, others = int(real.sum()), int((~real).sum())
    if not n or not others:
        raise InterventionError(
            f"the reference holds {n} of {len(scores)} scored items; some must be in it and some not",
            hint="choose another reference, or a circuit that scores more",
        )
    return float((ranks(scores)[real].sum() - n * (n - 1) / 2) / (n * others))
