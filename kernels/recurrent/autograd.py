"""A recurrence as one step of autograd: PyTorch chunk by chunk, or Triton for tensors on a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from workbench.kernels.recurrent import chunked
from workbench.kernels.recurrent.chunked import Inputs

TRITON_WIDTH = 256
"""The largest d and width that the Triton kernels take."""


def run(inputs: Inputs, state: Tensor | None = None, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """What is read, [batch, head, position, width] in v's dtype, and the state after the last position.

    Gradients reach all inputs and the initial state.

    Args:
        state: [batch, head, d, width] before the first position, of `inputs.dtype`; None for zeros.
        chunk: positions in a chunk in PyTorch; `inputs.chunk` if None.
    """
    found: tuple[Tensor, Tensor] = _Recurrence.apply(*vars(inputs).values(), state, chunk or inputs.chunk)
    return found


class _Recurrence(torch.autograd.Function):
    """(q, k, v, log_decay, beta, initial state) -> (output, final state)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, log_decay, beta, state)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        inputs = Inputs(q, k, v, log_decay, beta)
        if _on_triton(inputs):
            from workbench.kernels.recurrent import triton

            return triton.forward(inputs, state)
        return chunked.forward(inputs, state, chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, state = ctx.saved_tensors
        inputs = Inputs(*tensors)
        grad_out = torch.zeros_like(inputs.v) if grad_out is None else grad_out
        if _on_triton(inputs):
            from workbench.kernels.recurrent import triton

            found, d_state = triton.backward(inputs, state, grad_out, grad_state)
        else:
            found, d_state = chunked.backward(inputs, state, ctx.chunk, grad_out, grad_state)
        return *(found.get(name) for name in vars(inputs)), None if state is None else d_state, None


def _on_triton(inputs: Inputs) -> bool:
    """Whether the Triton kernels take them: on a GPU, not float64, no wider than they are compiled for."""
    fits = inputs.dtype != torch.float64 and max(inputs.q.shape[3], inputs.v.shape[3]) <= TRITON_WIDTH
    return inputs.q.is_cuda and fits and find_spec("triton") is not None
