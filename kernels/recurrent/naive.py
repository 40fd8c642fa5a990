"""Linear recurrences as they are defined, position by position: the reference for every chunked form."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What y_t = q_t·h_t reads from h_t = Λ_t h_{t−1} + β_t k_t v_tᵀ, and the last state.

    Λ_t is diag(exp g_t), and with β the delta rule's (I − β_t k_t k_tᵀ) diag(exp g_t) (arXiv 2412.06464; with one g for
    each channel of the state arXiv 2510.26692); without β the written k_t v_tᵀ is added as it is.

    Args:
        q, k: [batch, head, position, d]. v: [batch, head, position, width].
        log_decay: g, [batch, head, position] or [batch, head, position, d]; None for no decay.
        beta: [batch, head, position]; None for no erasing.
        state: [batch, head, d, width] before the first position; None for zeros.

    Returns: [batch, head, position, width] and [batch, head, d, width].
    """
    state = v.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
    out = []
    for t in range(q.shape[2]):
        key = k[:, :, t, :, None]
        if log_decay is not None:
            state = state * log_decay[:, :, t].reshape(*state.shape[:2], -1, 1).exp()
        written = v[:, :, t, None, :]
        if beta is not None:
            written = (written - (key * state).sum(-2, keepdim=True)) * beta[:, :, t, None, None]
        state = state + key * written
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, dim=2), state


def naive_recurrent_pattern(
    q: Tensor, k: Tensor, log_decay: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    """A[i, j] = q_i · Λ_i … Λ_{j+1} β_j k_j for j ≤ i, else 0: [batch, head, query, key].

    The recurrence is linear in its values: column j is what it makes of a one at position j.

    >>> one = torch.ones(1, 1, 3, 1)
    >>> naive_recurrent_pattern(one, one, torch.full((1, 1, 3), 0.5).log())[0, 0].tolist()
    [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]
    """
    units = torch.eye(q.shape[2], dtype=q.dtype, device=q.device).expand(*q.shape[:2], -1, -1)
    return naive_recurrence(q, k, units, log_decay, beta)[0]
