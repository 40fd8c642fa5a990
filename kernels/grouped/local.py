"""Local attention: a block of neighbours sees itself and the blocks beside it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from workbench.kernels.checks import check_range
from workbench.kernels.functions import attention_function
from workbench.kernels.grouped.attention import check_sequence, group_weights
from workbench.kernels.grouped.pattern import GroupedPattern, apply_groups


@lru_cache(maxsize=16)
def local_groups(n: int, block: int, back: int, ahead: int) -> tuple[Tensor, Tensor]:
    """The queries of each block, [group, block], and the keys that it sees, [group, (back + 1 + ahead) · block].

    They are positions; −1 stands for what lies outside of the sequence.

    >>> rows, columns = local_groups(3, block=2, back=1, ahead=0)
    >>> rows.tolist(), columns.tolist()
    ([[0, 1], [2, -1]], [[-1, -1, 0, 1], [0, 1, 2, -1]])
    """
    check_range("block", block, 1, None)
    with torch.inference_mode(False):  # they are kept, also for calls whose gradients need them
        starts = torch.arange(0, n, block)[:, None]
        rows = starts + torch.arange(block)
        columns = starts + torch.arange(-back * block, (ahead + 1) * block)
        return tuple(t.where((t >= 0) & (t < n), -1) for t in (rows, columns))  # type: ignore[return-value]


def _groups(q: Tensor, block: int, causal: bool) -> tuple[Tensor, Tensor]:
    rows, columns = local_groups(q.shape[2], block, 1, 0 if causal else 1)
    return rows[None, None].to(q.device), columns[None, None].to(q.device)


def _pattern(q: Tensor, k: Tensor, *, block: int, causal: bool = False, scale: float | None = None) -> GroupedPattern:
    check_sequence(q, k)
    rows, columns = _groups(q, block, causal)
    weights = group_weights(q, k, rows, columns, scale=scale, causal=causal)
    return GroupedPattern(weights, rows, columns, q.shape[2], k.shape[2], causal=causal)


@attention_function(_pattern)
def local_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block: int, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Softmax attention of each block of neighbours over itself, the block before it, and, if not causal, the next one.

    Args:
        q, k: [batch, head, position, d]; v: the same with its own width.
        block: positions in a block; the last one may be smaller.
        causal: no key after the query is seen.
        scale: factor on q kᵀ; 1/√d if None.

    Returns:
        [batch, head, position, width].

    Raises:
        CaptureError: tensors that do not fit, or a block below 1.

    >>> q = k = v = torch.ones(1, 2, 7, 4)
    >>> local_attention(q, k, v, block=3, causal=True).shape
    torch.Size([1, 2, 7, 4])
    """
    check_sequence(q, k, v)
    rows, columns = _groups(q, block, causal)
    weights = group_weights(q, k, rows, columns, scale=scale, causal=causal)
    return apply_groups(weights, v.to(weights.dtype), rows, columns, q.shape[2]).to(v.dtype)
