"""Lightning Attention-2 in PyTorch: linear time and memory, forward and backward (arXiv 2401.04658, alg. 1 and 2).

Within a chunk of L positions scores are a small decayed matrix; everything before it is one state KV [d, width] per
head. With r = 1..L the place in the chunk, position r reads the state faded by λ^r and adds to the next one faded by
λ^(L−r): both exponents are at least zero, so that no power of λ overflows however small λ is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from workbench.kernels.checks import state_dtype
from workbench.kernels.lightning.decay import powers


class _Fade:
    """Powers of λ for chunks of one length, [head, ...], ready to broadcast over [batch, head, position, d]."""

    def __init__(self, decay: Tensor, length: int, like: Tensor) -> None:
        r = torch.arange(1, length + 1)
        away = (r[:, None] - r[None, :]).clamp(min=0)
        self.within = powers(decay, away, like).tril()  # M, [head, L, L]
        self.since = since_start(decay, length, like)  # Λ, [head, L, 1]: from the state to each position
        self.until = powers(decay, length - r, like)[..., None]  # from each position to the next state
        self.whole = powers(decay, torch.tensor([[length]]), like)  # [head, 1, 1]


def since_start(decay: Tensor, n: int, like: Tensor) -> Tensor:
    """[head, n, 1]: λ, λ², …, by which the first n positions read the state before them faded."""
    return powers(decay, torch.arange(1, n + 1), like)[..., None]


class _Fades:
    """A `_Fade` for every chunk: all but the last are of one length."""

    def __init__(self, decay: Tensor, n: int, chunk: int, like: Tensor) -> None:
        self.slices = [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]
        lengths = {at.stop - at.start for at in (self.slices[0], self.slices[-1])}
        self._of = {length: _Fade(decay, length, like) for length in lengths}

    def __iter__(self) -> Iterator[tuple[slice, _Fade]]:
        return ((at, self._of[at.stop - at.start]) for at in self.slices)

    def __reversed__(self) -> Iterator[tuple[slice, _Fade]]:
        return ((at, self._of[at.stop - at.start]) for at in reversed(self.slices))


def _chunk_of(tensors: Sequence[Tensor], at: slice, dtype: torch.dtype) -> list[Tensor]:
    return [tensor[:, :, at].to(dtype) for tensor in tensors]


def zero_state(q: Tensor, v: Tensor) -> Tensor:
    """[batch, head, d, width] of zeros: the state before the first position."""
    return torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=state_dtype(q), device=q.device)


def forward(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """The output [batch, head, position, width] in v's dtype and the state after the last position.

    Args:
        q, k: [batch, head, position, d]. v: [batch, head, position, width]. decay: [head] float64 on the CPU.
        state: [batch, head, d, width] before the first position; None for zeros.
        chunk: positions per chunk.
    """
    state = zero_state(q, v) if state is None else state
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for at, fade in _Fades(decay, q.shape[2], chunk, state):
            qs, ks, vs = _chunk_of((q, k, v), at, state.dtype)
            scores = (qs @ ks.transpose(-1, -2)).mul_(fade.within)
            out[:, :, at] = scores @ vs + (qs * fade.since) @ state
            state = fade.whole * state + (ks * fade.until).transpose(-1, -2) @ vs
    return out, state


def added_state(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, chunk: int) -> Tensor:
    """[batch, head, d, width]: the state after the last position where there was none before the first.

    Args:
        q: for its dtype and heads alone. The others as of `forward`.
    """
    state = zero_state(q, v)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for at, fade in _Fades(decay, k.shape[2], chunk, state):
            ks, vs = _chunk_of((k, v), at, state.dtype)
            state = fade.whole * state + (ks * fade.until).transpose(-1, -2) @ vs
    return state


def read_state(q: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """[batch, head, position, width] in the state's dtype: what every position reads of the initial state."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return (q.to(state.dtype) * since_start(decay, q.shape[2], state)) @ state


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    state: Tensor | None,
    chunk: int,
    grad_out: Tensor,
    grad_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state, from those of the output and of the final state (alg. 2).

    The states are made again on the way, so that nothing but the inputs is kept between the passes.
    """
    state = zero_state(q, v) if state is None else state
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    d_state = torch.zeros_like(state) if grad_state is None else grad_state.to(state.dtype)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        fades = _Fades(decay, q.shape[2], chunk, state)
        for at, fade in fades:
            ks, vs, do = _chunk_of((k, v, grad_out), at, state.dtype)
            d_scores = (do @ vs.transpose(-1, -2)).mul_(fade.within)
            dq[:, :, at] = d_scores @ ks + (do * fade.since) @ state.transpose(-1, -2)
            state = fade.whole * state + (ks * fade.until).transpose(-1, -2) @ vs
        for at, fade in reversed(fades):
            qs, ks, vs, do = _chunk_of((q, k, v, grad_out), at, state.dtype)
            scores = (qs @ ks.transpose(-1, -2)).mul_(fade.within)
            d_scores = (do @ vs.transpose(-1, -2)).mul_(fade.within)
            dk[:, :, at] = d_scores.transpose(-1, -2) @ qs + (vs * fade.until) @ d_state.transpose(-1, -2)
            dv[:, :, at] = scores.transpose(-1, -2) @ do + (ks * fade.until) @ d_state
            d_state = fade.whole * d_state + (qs * fade.since).transpose(-1, -2) @ do
    return dq, dk, dv, d_state
