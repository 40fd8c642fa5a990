"""Scan attention as it is defined: one softmax over every prefix. The reference for every faster form."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_pattern(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """A[t, j] = softmax over j ≤ t of scale · q·k_j, else 0: [batch, head, position, position].

    Args:
        q: [batch, head, 1, d], one query per head. k: [batch, head, position, d]. scale: 1/√d if None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * (q @ k.transpose(-1, -2))
    n = k.shape[2]
    hidden = torch.ones(n, n, dtype=torch.bool, device=k.device).triu(1)
    return scores.expand(-1, -1, n, -1).masked_fill(hidden, -torch.inf).softmax(-1)


def naive_scan(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """A·V, [batch, head, position, width]: position t is attention over tokens 0..t (arXiv 2405.13956).

    >>> q, k = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 3, 1)
    >>> naive_scan(q, k, torch.tensor([[[[3.0], [1.0], [2.0]]]])).flatten().tolist()
    [3.0, 2.0, 2.0]
    """
    return naive_pattern(q, k, scale) @ v
