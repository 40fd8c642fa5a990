"""From a map over patches to a click, and what to train such a map on: V2P (Chen et al. 2025, arXiv 2508.13634).

A pointer's weights α over the patches of a screen are drawn towards the middle of a target, with labels that are a
Gaussian as wide as the target, and pushed off everything else. A click is then the middle of the brightest region.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.analysis.grounding.tiles import Box
from workbench.errors import WorkbenchError

FACTOR = 4.1325
"""Widths of a target in standard deviations of its label: 96.1 % of a Gaussian lie inside, along either edge."""
THRESHOLD = 0.3
"""Of the largest weight: what is above it belongs to a region."""


def click_labels(box: Box | Tensor, patches: Tensor, factor: float = FACTOR) -> Tensor:
    """[patch] how much of a Gaussian around the middle of a box lies in each patch, within the box; not normalised.

    Its standard deviations are the box's width and height over `factor`; towards 0 labels are even over the box,
    towards infinity the patch in its middle has all. Of patches that tile a picture with the box inside they sum to
    (2 Φ(factor / 2) − 1)².

    Args:
        box: (x0, y0, x1, y1). patches: [patch, 4] likewise.

    Raises:
        WorkbenchError: an empty box, or a factor that is not above 0.
    """
    x0, y0, x1, y1 = (float(n) for n in box)
    if not (x1 > x0 and y1 > y0) or not factor > 0:
        raise WorkbenchError(f"a box {[x0, y0, x1, y1]} and a factor of {factor} give no label")
    across = _mass(patches[:, 0], patches[:, 2], x0, x1, factor)
    return across * _mass(patches[:, 1], patches[:, 3], y0, y1, factor)


def _mass(low: Tensor, high: Tensor, start: float, end: float, factor: float) -> Tensor:
    middle, spread = (start + end) / 2, (end - start) / factor
    low, high = (edge.double().clamp(start, end) for edge in (low, high))
    return torch.special.ndtr((high - middle) / spread) - torch.special.ndtr((low - middle) / spread)


def click_losses(weights: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """KL(labels ‖ weights) and the weight on patches without label, each a mean over pointers; V2P's loss is their sum.

    Both are least, at 0, where weights are the labels.

    Args:
        weights: [..., patch] that sum to 1. labels: [..., patch] of `click_labels`, brought to sum 1 here.

    >>> labels = torch.tensor([[0.2, 0.2, 0.0, 0.0]])
    >>> [round(float(loss), 4) for loss in click_losses(torch.tensor([[0.25, 0.25, 0.25, 0.25]]), labels)]
    [0.6931, 0.5]
    """
    wanted = labels / (labels.sum(-1, keepdim=True) + 1e-8)
    ratio = torch.special.xlogy(wanted, wanted) - torch.special.xlogy(wanted, weights.clamp(min=1e-30))
    return ratio.sum(-1).mean(), (weights * (labels == 0)).sum(-1).mean()


def regions(weights: Tensor, cells: Tensor, threshold: float = THRESHOLD) -> list[Tensor]:
    """Regions of patches that share edges and have more than `threshold` of the largest weight; the brightest first.

    Args:
        weights: [patch]. cells: [patch, 2], row and column of each, or [patch, 3] with a tile before them.

    Returns:
        Of each region, the places of its patches among `weights`.

    >>> regions(torch.tensor([0.1, 0.4, 0.0, 0.5]), torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3]]))
    [tensor([3]), tensor([1])]
    """
    if weights.dim() != 1 or cells.shape[:1] != weights.shape:
        raise WorkbenchError("a weight for each cell is needed", shape=weights.shape)
    bright = weights > threshold * weights.max()
    waiting = {tuple(cells[i].tolist()): i for i in bright.nonzero()[:, 0].tolist()}
    found: list[list[int]] = []
    while waiting:
        cell, i = waiting.popitem()
        region, edge = [i], [cell]
        while edge:
            *tile, row, column = edge.pop()
            for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                at = waiting.pop((*tile, *near), None)
                if at is not None:
                    region.append(at)
                    edge.append((*tile, *near))
        found.append(sorted(region))
    found.sort(key=lambda one: (-float(weights[one].max()), one))
    return [torch.tensor(one) for one in found]


def click(weights: Tensor, patches: Tensor, cells: Tensor, threshold: float = THRESHOLD) -> tuple[float, float]:
    """(x, y) the middle of the brightest region: the mean of its patches' middles, by weight.

    Args:
        patches: [patch, 4] boxes. weights, cells, threshold: as `regions` takes them.

    Raises:
        WorkbenchError: there is no weight on any patch that lies on the picture.
    """
    placed = patches.isfinite().all(-1)
    weights = weights.double().where(placed, torch.zeros((), dtype=torch.float64))
    if not float(weights.max()) > 0:
        raise WorkbenchError("nothing points anywhere: there is no weight on the picture")
    best = regions(weights, cells, threshold)[0]
    middles = (patches[best, :2] + patches[best, 2:]).double() / 2
    x, y = (middles * weights[best, None]).sum(0) / weights[best].sum()
    return float(x), float(y)


def hits(point: tuple[float, float], box: Sequence[float]) -> bool:
    """Whether a click lands in a box (x0, y0, x1, y1)."""
    x, y = point
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]
