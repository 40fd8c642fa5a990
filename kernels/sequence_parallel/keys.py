"""Keys and values of all processes, with gradients: what attention from the positions of one of them reads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from workbench.kernels.sequence_parallel.blocks import join
from workbench.kernels.sequence_parallel.split import SplitSequence

_ROWS = 256  # queries of a tile


def keys_so_far(k: Tensor, v: Tensor, split: SplitSequence) -> tuple[Tensor, Tensor]:
    """Keys and values [batch, kv head, position, d or width] of all positions up to the last one here.

    One all-gather forward, and one sum backward. Every process calls it with its own.
    """
    packed: Tensor = _All.apply(torch.cat([k, v], dim=-1), split)
    keys, values = packed[:, :, : split.here.stop].split([k.shape[-1], v.shape[-1]], dim=-1)
    return keys, values


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor | None]:
    """softmax(scale · q kᵀ) v where the queries are the last of the keys' positions.

    Without gradients on a CPU, PyTorch's kernel runs twice, on the keys before the queries and on their own, and the
    halves are joined by their log-sum-exps; else it runs in tiles of queries. No mask is larger than a tile.

    Returns:
        The output [batch, head, query, width], and the log-sum-exp [batch, head, query]; None where it runs in tiles.
    """
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if q.device.type == "cpu" and not learns and q.shape[-1] == v.shape[-1]:
        return _in_halves(q, k, v, scale)
    offset, outs = k.shape[2] - q.shape[2], []
    for first in range(0, q.shape[2], _ROWS):
        last = min(first + _ROWS, q.shape[2])
        rows = torch.arange(first, last, device=q.device)[:, None] + offset
        seen = torch.arange(offset + last, device=q.device) <= rows
        keys, values = k[:, :, : offset + last], v[:, :, : offset + last]
        outs.append(
            F.scaled_dot_product_attention(
                q[:, :, first:last], keys, values, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outs, dim=2), None


def _in_halves(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    group, offset = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    keys, values = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))

    def run(at: slice, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys[:, :, at], values[:, :, at], is_causal=causal, scale=scale
        )
        return out, lse

    out, lse = run(slice(offset, None), True)
    if offset:
        out, lse = join(out, lse, *run(slice(0, offset), False))
    return out.to(v.dtype), lse


class _All(torch.autograd.Function):
    """A process's [batch, head, position, width] -> that of all."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, split: SplitSequence) -> Tensor:
        ctx.split = split
        longest = max(split.lengths)
        found = split.gather(F.pad(own, (0, 0, 0, longest - own.shape[2]))).wait()
        return torch.cat([part[:, :, :n] for part, n in zip(found, split.lengths, strict=True)], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        here = ctx.split.here
        return ctx.split.summed(grad)[:, :, here.start : here.stop], None
