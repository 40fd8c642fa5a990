"""Linear attention over a split sequence, with decay or without: one all-gather forward and one backward.

LASP-2 (arXiv 2502.07563). Each process makes the state of its own positions, M_t = Σ_i λ^(C−i) k_i v_iᵀ, and all of
them are gathered; while they travel it attends within its own positions. What came before it reads as the initial state
Σ_{s<t} λ^(positions between) M_s. A state has d · width numbers for a head, whatever the length of the sequence.
Backward, gradients of these initial states are gathered in their turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention, state_dtype
from workbench.kernels.lightning.chunked import added_state, backward, forward, read_state, since_start, zero_state
from workbench.kernels.lightning.decay import check_decay, powers
from workbench.kernels.sequence_parallel.split import SplitSequence


def split_lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, split: SplitSequence, decay: Tensor | None = None, *, chunk: int = 64
) -> Tensor:
    """Causal linear attention with decay over all positions of a split sequence: `lightning_attention`, in parts.

    Every process calls it with its own positions. One all-gather forward and one backward, of d · width numbers for
    each head in float32 (float64 for float64 inputs).

    Args:
        q: [batch, head, position here, d]. k: [batch, kv head, position here, d]. v: [batch, kv head, …, width].
        split: of the sequence.
        decay: [head], λ in (0, 1]; `decays(n_heads)` if None, ones for plain causal linear attention.
        chunk: positions per chunk; it changes the speed, and the result by rounding only.

    Returns:
        [batch, head, position here, width] in the dtype of v.

    Raises:
        CaptureError: as `lightning_attention`; positions that are not those of the split; a process that ended.
    """
    rates = check_decay(decay, q.shape[1])
    if chunk < 1:
        raise CaptureError(f"chunk is {chunk}; a chunk has at least one position", hint="pass 64 or 128")
    made: Tensor = _Causal.apply(*_checked(q, k, v, split), split, rates, chunk)
    return made


def split_linear_attention(q: Tensor, k: Tensor, v: Tensor, split: SplitSequence) -> Tensor:
    """Linear attention of every position to all positions of a split sequence, o_i = Σ_j (q_i·k_j) v_j.

    Args and errors are as of `split_lightning_attention`.
    """
    made: Tensor = _Whole.apply(*_checked(q, k, v, split), split)
    return made


def _checked(q: Tensor, k: Tensor, v: Tensor, split: SplitSequence) -> tuple[Tensor, Tensor, Tensor]:
    check_attention(q, k, v)
    split.check("q", q)
    split.check("k", k)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return q, k, v


class _Causal(torch.autograd.Function):
    """(q, k, v) of this process -> its output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, split: SplitSequence, decay: Tensor, chunk: int) -> Tensor:
        states = split.gather(added_state(q, k, v, decay, chunk))
        out, _ = forward(q, k, v, decay, None, chunk)  # while they travel
        before = _weighted(states.wait(), split, decay, range(split.rank))
        ctx.save_for_backward(q, k, v, before)
        ctx.rest = split, decay, chunk
        return out if before is None else out + read_state(q, decay, before).to(out.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, before = ctx.saved_tensors
        split, decay, chunk = ctx.rest
        state = zero_state(q, v)
        if split.rank:  # the gradient of the initial state, Σ_r λ^r q_r ∂o_rᵀ; the first process reads none
            faded = q.to(state.dtype) * since_start(decay, q.shape[2], state)
            state = faded.mT @ grad_out.to(state.dtype)
        later = _weighted(split.gather(state).wait(), split, decay, range(split.rank + 1, split.size))
        return *backward(q, k, v, decay, before, chunk, grad_out, later)[:3], None, None, None


class _Whole(torch.autograd.Function):
    """The same without an order: all read the sum of all states."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, split: SplitSequence) -> Tensor:
        own = k.to(state_dtype(q)).mT @ v.to(state_dtype(q))
        state = torch.stack(list(split.gather(own).wait())).sum(0)
        ctx.save_for_backward(q, k, v, state)
        ctx.split = split
        return (q.to(state.dtype) @ state).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, state = ctx.saved_tensors
        grad = grad_out.to(state.dtype)
        d_state = torch.stack(list(ctx.split.gather(q.to(state.dtype).mT @ grad).wait())).sum(0)
        dk, dv = v.to(state.dtype) @ d_state.mT, k.to(state.dtype) @ d_state
        return (grad @ state.mT).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _weighted(states: Sequence[Tensor], split: SplitSequence, decay: Tensor, of: range) -> Tensor | None:
    """Σ of the states of some processes, faded by the positions that lie between them and this one; None of none."""
    total: Tensor | None = None
    for rank in of:
        low, high = sorted((rank, split.rank))
        between = torch.tensor([[sum(split.lengths[low + 1 : high])]])
        faded = powers(decay, between, states[rank]) * states[rank]
        total = faded if total is None else total + faded
    return total
