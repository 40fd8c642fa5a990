"""Token-to-audio alignment: dynamic time warping through a map of output tokens by encoder positions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from workbench.analysis.saliency.normalising import standardised
from workbench.errors import WorkbenchError


def align(maps: Tensor) -> Tensor:
    """[token, 2] first and last position of each token on the monotone path of the largest sum.

    Each token's row is standardised first. Every position is given to a token and every token to a position, tokens in
    order; a step goes to the next position, the next token, or both.

    Args:
        maps: [token, position].

    Raises:
        WorkbenchError: an empty map, or one that is not finite.

    >>> align(torch.tensor([[9.0, 8.0, 0.0, 0.0], [0.0, 0.0, 1.0, 7.0]])).tolist()
    [[0, 1], [2, 3]]
    """
    if maps.dim() != 2 or not maps.numel() or not maps.isfinite().all():
        raise WorkbenchError("an alignment needs a finite map [token, position]", shape=maps.shape)
    cost = -standardised(maps.double()).numpy()
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    came = np.zeros((n, m), dtype=np.int8)
    for i in range(n):
        for j in range(m):
            before = (total[i, j], total[i, j + 1], total[i + 1, j])  # both, next token, next position
            came[i, j] = step = min((0, 2, 1), key=before.__getitem__)
            total[i + 1, j + 1] = cost[i, j] + before[step]
    spans = torch.zeros(n, 2, dtype=torch.long)
    i, j = n - 1, m - 1
    spans[i, 1] = j
    while (i, j) != (0, 0):
        step = came[i, j]
        if step == 2:
            j -= 1
            continue
        spans[i, 0] = j
        i, j = i - 1, j - (step == 0)
        spans[i, 1] = j
    return spans


def disagreement(a: Tensor, b: Tensor) -> Tensor:
    """[token] distance of the middles of two alignments [token, 2], in positions.

    >>> disagreement(torch.tensor([[0, 2]]), torch.tensor([[2, 4]])).tolist()
    [2.0]
    """
    return (a.double().mean(1) - b.double().mean(1)).abs()
