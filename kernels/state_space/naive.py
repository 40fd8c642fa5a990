"""The maps of state-space mixers as they are defined, dense: the reference for every tiled form."""

from __future__ import annotations

import torch
from torch import Tensor


def _decay(rate: Tensor, delta: Tensor) -> Tensor:
    """[..., query, key]: exp(rate · Σ_{t=j+1..i} Δ_t) for j ≤ i, else 0; hidden before the exp, where it would grow."""
    total = delta.cumsum(-1)
    hidden = torch.ones(len(delta), len(delta), dtype=torch.bool, device=delta.device).triu(1)
    exponent = rate[..., None, None] * (total[:, None] - total[None, :])
    return exponent.masked_fill(hidden, -torch.inf).exp()


def naive_selective(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """M[i, j] = Σ_s C_i[s] exp(A[s] Σ_{t=j+1..i} Δ_t) Δ_j B_j[s], the map of one channel of S6 (arXiv 2403.01590).

    Args:
        delta: [position]. A: [state], at most zero. B, C: [position, state].

    Returns: [query, key], with y = M u for h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t and y_t = C_t·h_t.
    """
    return torch.einsum("is,sij,js->ij", C, _decay(A, delta), B) * delta


def naive_dual(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """M[i, j] = (C_i·B_j) exp(A Σ_{t=j+1..i} Δ_t) Δ_j, the map of one head of SSD (arXiv 2405.21060).

    Args:
        delta: [position]. A: one number, at most zero. B, C: [position, state].
    """
    return C @ B.T * _decay(A, delta) * delta
