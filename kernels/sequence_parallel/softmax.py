"""Softmax attention over a split sequence: keys and values are gathered (LASP-2H), or go round in a ring.

Either way each process attends from its own positions, block by block, and joins the blocks by their log-sum-exps: no
process holds a map. Gathered, all keys and values lie on every process, and one operation forward and one backward send
them (arXiv 2502.07563); in a ring every process holds one other's at a time, which is the distributed multi-head
attention that "A Unified View of Long-Sequence Models" (arXiv 2302.06218) asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention, check_number, state_dtype
from workbench.kernels.sequence_parallel.blocks import block_backward, block_forward, join
from workbench.kernels.sequence_parallel.split import SplitSequence

How = Literal["gather", "ring"]


def split_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: SplitSequence,
    *,
    causal: bool = True,
    scale: float | None = None,
    how: How = "gather",
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v over all positions of a split sequence, for the positions of this process.

    Every process calls it with its own positions.

    Args:
        q: [batch, head, position here, d]. k, v: [batch, kv head, position here, d or width]; heads are a multiple of
            kv heads.
        split: of the sequence.
        causal: whether positions see themselves and those before them; else all.
        scale: factor on q kᵀ; 1/√d if None.
        how: "gather" sends keys and values of all to all at once; "ring" passes them on from process to process, so
            that memory holds those of two. Results differ by rounding.

    Returns:
        The output [batch, head, position here, width] in the dtype of v, and the log-sum-exp [batch, head, position
        here] in float32 (float64 for float64 inputs), which has no gradient.

    Raises:
        CaptureError: sizes that do not fit each other or the split; a process that ended.
    """
    if how not in ("gather", "ring"):
        raise CaptureError(f"keys are sent by gather or ring, not {how!r}")
    check_attention(q, k, v)
    split.check("q", q)
    split.check("k", k)
    factor = q.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)
    out, lse = _Split.apply(q, k, v, split, causal, factor, how)
    return out, lse


class _Split(torch.autograd.Function):
    """(q, k, v) of this process -> (output, log-sum-exp)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, split: SplitSequence, causal: bool, scale: float, how: How
    ) -> tuple[Tensor, Tensor]:
        packed, found = torch.cat([k, v], dim=-1), None
        kept = gathered(packed, split) if how == "gather" else []
        for rank, part in enumerate(kept) if kept else _ring(packed, split):
            if causal and rank > split.rank:
                continue
            block = block_forward(*_wide(q, part), scale, causal and rank == split.rank)
            found = block if found is None else join(*found, *block)
        assert found is not None
        out, lse = found
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        ctx.rest = split, causal, scale
        ctx.mark_non_differentiable(lse)
        return out.to(v.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *kept = ctx.saved_tensors
        split, causal, scale = ctx.rest
        grad = grad_out.to(out.dtype)
        drift = (grad * out).sum(-1)
        dq = torch.zeros_like(out[..., :1].expand(q.shape))

        def of_block(rank: int, part: Tensor) -> Tensor:
            """[batch, kv head, position there, d + width]: gradients of the keys and values of a process."""
            nonlocal dq
            if causal and rank > split.rank:
                return part.new_zeros(part.shape, dtype=out.dtype)
            queries, keys, values = _wide(q, part)
            more, *rest = block_backward(queries, keys, values, grad, lse, drift, scale, causal and rank == split.rank)
            dq = dq + more
            return torch.cat(rest, dim=-1)

        if kept:
            parts = [_padded(of_block(rank, part), split) for rank, part in enumerate(kept)]
            own = split.summed(torch.stack(parts))[split.rank]
        else:
            packed = torch.cat([k, v], dim=-1)
            own = torch.zeros_like(_padded(packed, split), dtype=out.dtype)
            for rank, part in _ring(packed, split):  # their gradients go round with them, and on until they are home
                own[:, :, : part.shape[2]] += of_block(rank, part)
                own = split.passed_on(own)
        dk, dv = own[:, :, : k.shape[2]].split([k.shape[-1], v.shape[-1]], dim=-1)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _wide(q: Tensor, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, and keys and values that are packed, in the dtype in which attention is computed."""
    wide = part.to(state_dtype(q))
    return q.to(wide.dtype), wide[..., : q.shape[-1]], wide[..., q.shape[-1] :]


def _padded(tensor: Tensor, split: SplitSequence) -> Tensor:
    """As long as the longest part: what is sent has one shape."""
    return F.pad(tensor, (0, 0, 0, max(split.lengths) - tensor.shape[2]))


def gathered(packed: Tensor, split: SplitSequence) -> list[Tensor]:
    """The tensors [batch, kv head, position there, …] of all processes, by one operation."""
    found = split.gather(_padded(packed, split)).wait()
    return [part[:, :, :n] for part, n in zip(found, split.lengths, strict=True)]


def _ring(packed: Tensor, split: SplitSequence) -> Iterator[tuple[int, Tensor]]:
    """The same one after the other, this process's first, with the process that each is of."""
    part = _padded(packed, split)
    for step in range(split.size):
        rank = (split.rank - step) % split.size
        yield rank, part[:, :, : split.lengths[rank]]
        if step + 1 < split.size:
            part = split.passed_on(part)
