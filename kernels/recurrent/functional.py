"""Gated linear attention and the gated delta rule for models: checks, and the pattern that a call tells."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_finite, check_state
from workbench.kernels.functions import attention_function
from workbench.kernels.recurrent.autograd import run
from workbench.kernels.recurrent.chunked import Inputs
from workbench.kernels.recurrent.pattern import RecurrentPattern, check_recurrence


def _pattern(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> RecurrentPattern:
    """The pattern of a call; what its rows read of an initial state is its `before`."""
    made = RecurrentPattern(q, k, log_decay, beta, n_heads=v.shape[1])
    if initial_state is not None:
        made.before = made.from_state(initial_state)
    return made


@attention_function(_pattern)
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    chunk: int | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention whose state fades: h_t = diag(exp g_t) h_{t−1} + k_t v_tᵀ and y_t = q_t·h_t; no scale.

    With one g for each head it is what Mamba-2, RetNet and mLSTM compute, with one for each channel of the state GLA
    (arXiv 2312.06635). Linear in time and memory, with gradients for all inputs. Tensors on CUDA run Triton kernels,
    except in float64 and with d or width above 256; all others run in PyTorch.

    Args:
        q, k: [batch, group, position, d]; the heads are split evenly among the groups.
        v: [batch, head, position, width].
        log_decay: g, at most zero: [batch, head, position] or [batch, head, position, d]; None for no decay.
        chunk: positions per chunk in PyTorch. It changes the speed, and the result by rounding only.
        initial_state: [batch, head, d, width], the state that an earlier segment returned, in float32 (float64 for
            float64 inputs).
        return_state: also return the state after the last position.

    Returns:
        [batch, head, position, width] in the dtype of v; with `return_state` also the state, [batch, head, d, width].

    Raises:
        CaptureError: sizes that do not fit, no positions, mixed dtypes, NaN or inf; a log_decay above zero, a chunk
            below 1, a state of the wrong shape or dtype.

    >>> one = torch.ones(1, 1, 4, 1)
    >>> gated_linear_attention(one, one, one, one[..., 0].div(2).log()).flatten().tolist()
    [1.0, 1.5, 1.75, 1.875]
    """
    return _run(q, k, v, log_decay, None, chunk, initial_state, return_state)


@attention_function(_pattern)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    chunk: int | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `gated_linear_attention`, but a value takes the place of what its key held: the state loses β k (kᵀ h) first.

    h_t = (I − β_t k_t k_tᵀ) diag(exp g_t) h_{t−1} + β_t k_t v_tᵀ (arXiv 2412.06464; without g the delta rule of
    arXiv 2406.06484, with one g for each channel of the state Kimi's, arXiv 2510.26692). Keys should have unit length:
    the rule is stable for β‖k‖² up to 2.

    Args:
        beta: [batch, head, position], how much of what a key held is replaced; one (all of it) if None.
        q, k, v, log_decay, chunk, initial_state, return_state: as there, and so the result.

    Raises:
        CaptureError: as there; a β that does not fit.

    >>> key, v = torch.ones(1, 1, 3, 1), torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    >>> gated_delta_rule(key, key, v).flatten().tolist()  # each value takes the place of the last
    [1.0, 2.0, 3.0]
    """
    steps = torch.ones_like(v[..., 0]) if beta is None and v.dim() == 4 and v.shape[3] else beta
    return _run(q, k, v, log_decay, steps, chunk, initial_state, return_state)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    chunk: int | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if v.dim() != 4 or v.shape[1] == 0:
        raise CaptureError("v must be [batch, head, position, width]", shape=v.shape)
    check_recurrence(q, k, log_decay, beta, v.shape[1])
    if (v.shape[0], v.shape[2]) != (q.shape[0], q.shape[2]) or v.dtype != q.dtype or v.device != q.device:
        raise CaptureError(
            f"v {list(v.shape)} {v.dtype} on {v.device} does not go with q {list(q.shape)} {q.dtype} on {q.device}",
            hint="both have the same batch and positions, dtype and device",
        )
    check_finite("v", v)
    if chunk is not None and chunk < 1:
        raise CaptureError(f"chunk is {chunk}; a chunk has at least one position", hint="pass 64 or 128")
    group = v.shape[1] // q.shape[1]
    if group > 1:
        q, k = q.repeat_interleave(group, dim=1), k.repeat_interleave(group, dim=1)
    inputs = Inputs(q, k, v, log_decay, beta)
    if initial_state is not None:
        check_state(initial_state, (*v.shape[:2], q.shape[3], v.shape[3]), q)
    out, state = run(inputs, initial_state, chunk)
    return (out, state) if return_state else out
