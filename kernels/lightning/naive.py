"""Lightning attention as it is defined, quadratic in the sequence: the reference for every faster form."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_pattern(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """A[i, j] = λ^(i−j) q_i·k_j for j ≤ i, else 0 (arXiv 2401.04658, eq. 5): [batch, head, query, key].

    Args:
        q, k: [batch, head, position, d]. decay: [head], λ in (0, 1].
    """
    i = torch.arange(q.shape[2], device=q.device)
    away = i[:, None] - i[None, :]
    faded = decay.to(q)[:, None, None] ** away.clamp(min=0)
    return (q @ k.transpose(-1, -2) * faded).tril()


def naive_lightning(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """A·V, [batch, head, position, width], for v [batch, head, position, width].

    >>> one = torch.ones(1, 1, 3, 1)
    >>> naive_lightning(one, one, one, torch.tensor([0.5])).flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    return naive_pattern(q, k, decay) @ v
