"""Lightning attention for models: checks, the choice between PyTorch and Triton, and gradients."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention, check_state
from workbench.kernels.functions import attention_function
from workbench.kernels.lightning import chunked
from workbench.kernels.lightning.decay import check_decay, log_decays
from workbench.kernels.lightning.pattern import LightningPattern
from workbench.kernels.recurrent.autograd import TRITON_WIDTH
from workbench.kernels.recurrent.chunked import Inputs


class _Lightning(torch.autograd.Function):
    """(q, k, v, initial state) -> (output, final state), with gradients for these four."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, decay: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, state)
        ctx.decay, ctx.chunk = decay, chunk
        ctx.set_materialize_grads(False)
        if _on_triton(q, v):
            from workbench.kernels.recurrent import triton

            return triton.forward(_recurrence(q, k, v, decay), state)
        return chunked.forward(q, k, v, decay, state, chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, state = ctx.saved_tensors
        grad_out = torch.zeros_like(v) if grad_out is None else grad_out
        if _on_triton(q, v):
            from workbench.kernels.recurrent import triton

            found, d_state = triton.backward(_recurrence(q, k, v, ctx.decay), state, grad_out, grad_state)
            grads = (*(found[name] for name in "qkv"), d_state)
        else:
            grads = chunked.backward(q, k, v, ctx.decay, state, ctx.chunk, grad_out, grad_state)
        return *grads[:3], None if state is None else grads[3], None, None


def _recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Inputs:
    """The same as a recurrence whose decay is that of a head at every position."""
    return Inputs(q, k, v, log_decays(decay, q.device)[None, :, None].expand(q.shape[:3]))


def _on_triton(q: Tensor, v: Tensor) -> bool:
    fits = q.dtype != torch.float64 and max(q.shape[3], v.shape[3]) <= TRITON_WIDTH
    return q.is_cuda and fits and find_spec("triton") is not None


def _pattern(
    q: Tensor, k: Tensor, decay: Tensor | None = None, initial_state: Tensor | None = None
) -> LightningPattern:
    """The pattern of a call; what its rows read of an initial state is its `before`."""
    made = LightningPattern(q, k, decay)
    if initial_state is not None:
        made.before = made.from_state(initial_state)
    return made


@attention_function(_pattern)
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    chunk: int = 64,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention with decay, o_i = Σ_{j≤i} λ^(i−j) (q_i·k_j) v_j: no softmax, no scale.

    Linear in time and memory (Lightning Attention-2, arXiv 2401.04658). Tensors on CUDA run a Triton kernel, in blocks
    of 64; all others run in PyTorch. Gradients reach q, k, v and the initial state. The decay gets none: it is a
    constant, as in the paper's code.

    Args:
        q: [batch, head, position, d].
        k: [batch, kv head, position, d]. The paper has as many kv heads as heads; fewer are repeated.
        v: [batch, kv head, position, width].
        decay: [head], λ in (0, 1]; `decays(n_heads)` if None.
        chunk: positions per chunk in PyTorch. It changes the speed, and the result by rounding only.
        initial_state: [batch, head, d, width], the state that an earlier segment returned, in float32 (float64 for
            float64 inputs).
        return_state: also return the state after the last position.

    Returns:
        [batch, head, position, width] in the dtype of v; with `return_state` also the state, [batch, head, d, width].

    Raises:
        CaptureError: sizes that do not fit, no positions, mixed dtypes, NaN or inf; a decay outside (0, 1], a chunk
            below 1, a state of the wrong shape or dtype.

    >>> one = torch.ones(1, 1, 4, 1)
    >>> first, state = lightning_attention(one[:, :, :2], *2 * [one[:, :, :2]], torch.tensor([0.5]), return_state=True)
    >>> rest = lightning_attention(one[:, :, 2:], *2 * [one[:, :, 2:]], torch.tensor([0.5]), initial_state=state)
    >>> torch.cat([first, rest], dim=2).flatten().tolist()
    [1.0, 1.5, 1.75, 1.875]
    """
    check_attention(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise CaptureError(
            f"lightning attention reads q and k at the same positions, not {q.shape[2]} and {k.shape[2]}",
            hint="hand an earlier segment over as initial_state=, not as more keys",
        )
    if chunk < 1:
        raise CaptureError(f"chunk is {chunk}; a chunk has at least one position", hint="pass 64 or 128")
    rates = check_decay(decay, q.shape[1])
    if initial_state is not None:
        check_state(initial_state, (*q.shape[:2], q.shape[3], v.shape[3]), q)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out, state = _Lightning.apply(q, k, v, initial_state, rates, chunk)
    return (out, state) if return_state else out
