"""Pearson and Spearman correlation of two maps, which do not exist where a map is constant."""

from __future__ import annotations

from torch import Tensor

from workbench.analysis.saliency.normalising import standardised
from workbench.analysis.statistics.correlation import correlation
from workbench.errors import WorkbenchError

NORMALISE = ("token", "all")


def prepared(maps: Tensor, normalise: str) -> Tensor | None:
    """[cell] a map [token, position] standardised per token or over all cells, in float64; None if it is constant."""
    if normalise not in NORMALISE:
        raise WorkbenchError(f"normalise is one of {', '.join(NORMALISE)}, not {normalise!r}")
    rows = maps.double() if normalise == "token" else maps.double().reshape(1, -1)
    flat = standardised(rows).flatten()
    return flat if bool(flat.any()) else None


def correlate(a: Tensor, b: Tensor, *, normalise: str = "token", measure: str = "pearson") -> float:
    """Correlation of two maps [token, position] over all their cells.

    Args:
        normalise: "token" standardises each token's row of both maps first, "all" leaves rows as they are (which a
            correlation over all cells does not feel). measure: "pearson" or "spearman" (ties share their mean rank).

    Raises:
        WorkbenchError: the shapes differ, or a map is constant and the correlation undefined.

    >>> import torch
    >>> round(correlate(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[2.0, 4.0, 8.0]])), 6)
    1.0
    """
    if a.shape != b.shape:
        raise WorkbenchError(f"maps of {list(a.shape)} and {list(b.shape)} cannot be compared")
    x, y = prepared(a, normalise), prepared(b, normalise)
    if x is None or y is None:
        which = "first" if x is None else "second"
        raise WorkbenchError(f"the {which} map is constant: its correlation is undefined")
    return correlation(x, y, measure)
