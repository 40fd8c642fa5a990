"""Softmax attention to one block of keys: output and log-sum-exp, and gradients where that of all blocks is known.

In tiles of queries, so that no map is held whole. Blocks are joined by their log-sum-exps; backward, the weights of a
block are exp(s − lse) with the lse of all blocks, so that its gradients are its part of the whole's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS = 256  # queries of a tile


def block_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Output [batch, head, query, width] and log-sum-exp [batch, head, query] of one block of keys.

    Args:
        q: [batch, head, query, d]. k, v: [batch, kv head, key, d or width], all of one dtype.
        causal: query i sees keys 0 to i of the block; else all.
    """
    out, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])
    keys, values = _wide(k, q), _wide(v, q)
    for at, scores in _tiles(q, keys, scale, causal):
        lse[:, :, at] = scores.logsumexp(-1)
        out[:, :, at] = (scores - lse[:, :, at, None]).exp() @ values
    return out, lse


def join(out: Tensor, lse: Tensor, more: Tensor, its_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two blocks' outputs and log-sum-exps as those of both together."""
    total = torch.logaddexp(lse, its_lse)
    return (lse - total).exp()[..., None] * out + (its_lse - total).exp()[..., None] * more, total


def block_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, drift: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's part of the gradient of q, and those of its k and v.

    Args:
        q, k, v, scale, causal: as of `block_forward`. grad: of the output of all blocks. lse: of all blocks.
        drift: [batch, head, query], Σ over the width of grad · output.
    """
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    keys, values = _wide(k, q), _wide(v, q)
    group = q.shape[1] // k.shape[1]
    for at, scores in _tiles(q, keys, scale, causal):
        weights = (scores - lse[:, :, at, None]).exp()
        moved = weights * (grad[:, :, at] @ values.mT - drift[:, :, at, None]) * scale
        dq[:, :, at] = moved @ keys
        dk += (moved.mT @ q[:, :, at]).unflatten(1, (-1, group)).sum(2)
        dv += (weights.mT @ grad[:, :, at]).unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv


def _wide(tensor: Tensor, q: Tensor) -> Tensor:
    group = q.shape[1] // tensor.shape[1]
    return tensor.repeat_interleave(group, dim=1) if group > 1 else tensor


def _tiles(q: Tensor, keys: Tensor, scale: float, causal: bool) -> Iterator[tuple[slice, Tensor]]:
    """Queries of each tile, and their scores [batch, head, query, key]."""
    for first in range(0, q.shape[2], _ROWS):
        at = slice(first, min(first + _ROWS, q.shape[2]))
        scores = q[:, :, at] @ keys.mT * scale
        if causal:
            rows = torch.arange(at.start, at.stop, device=q.device)
            scores.masked_fill_(torch.arange(keys.shape[2], device=q.device) > rows[:, None], -torch.inf)
        yield at, scores
