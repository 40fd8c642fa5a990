"""k-means and principal components, seeded and in float64: the same points give the same answer."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 100


def k_means(points: Tensor, k: int, seed: int, restarts: int = 20) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from k-means++ starts (Arthur and Vassilvitskii 2007); the best of some restarts.

    Args:
        points: [n, d]. k: clusters, at most n.

    Returns:
        Centres [k, d], and each point's cluster [n]. Clusters are numbered by falling size, then by first point. Where
        there are fewer than k different points, so are clusters.
    """
    random = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor] | None = None
    for _ in range(restarts):
        centres = _start(points, k, random)
        for _ in range(_ROUNDS):
            nearest = assign(points, centres)
            there = nearest.unique()
            moved = torch.stack([points[nearest == c].mean(0) for c in there])
            if moved.shape == centres.shape and torch.equal(moved, centres):
                break
            centres = moved
        nearest = assign(points, centres)
        cost = float((points - centres[nearest]).square().sum())
        if best is None or cost < best[0] - 1e-12:
            best = cost, nearest
    assert best is not None
    order = sorted(
        best[1].unique().tolist(), key=lambda c: (-int((best[1] == c).sum()), int((best[1] == c).nonzero()[0]))
    )
    renamed = torch.zeros_like(best[1])
    for new, old in enumerate(order):
        renamed[best[1] == old] = new
    return torch.stack([points[renamed == c].mean(0) for c in range(len(order))]), renamed


def assign(points: Tensor, centres: Tensor) -> Tensor:
    """[...] number of the centre nearest to each point [..., d]."""
    return (points[..., None, :] - centres).square().sum(-1).argmin(-1)


def _start(points: Tensor, k: int, random: torch.Generator) -> Tensor:
    """k points, each drawn with a chance that grows with the squared distance to those already drawn."""
    chosen = [int(torch.randint(len(points), (1,), generator=random))]
    for _ in range(k - 1):
        gap = (points[:, None] - points[chosen]).square().sum(-1).amin(1)
        if float(gap.sum()) <= 0:
            break
        chosen.append(int(torch.multinomial(gap, 1, generator=random)))
    return points[chosen]


def components(points: Tensor, n: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Principal components of points [m, d]: their mean [d], axes [n, d], and the share of the variance of each [n].

    The sign of an axis is such that its largest entry is positive. Axes that the points lack are zero.
    """
    mean = points.mean(0)
    _, values, rows = torch.linalg.svd(points - mean, full_matrices=False)
    axes = torch.zeros(n, points.shape[1], dtype=points.dtype)
    share = torch.zeros(n, dtype=points.dtype)
    total = float(values.square().sum())
    for i in range(min(n, len(values))):
        if total > 0 and float(values[i]) > 0:
            axes[i] = rows[i] * torch.sign(rows[i, rows[i].abs().argmax()])
            share[i] = values[i].square() / total
    return mean, axes, share
