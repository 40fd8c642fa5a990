"""Linear recurrences in PyTorch, chunk by chunk: linear time and memory, forward and backward.

Within a chunk of L positions, with h the state before it, D[i, j] what is left of position j at position i, q̂ and k̂
faded from the chunk's start to each position and k̃ from each position to its end:

    e = v,  or with a delta rule  (I + A β) e = v − k̂ h,  where  A[i, j] = (k_i·k_j) D[i, j], j < i
    y = q̂ h + P β e,              where  P[i, j] = (q_i·k_j) D[i, j], j ≤ i
    h' = Φ h + k̃ᵀ β e

(the WY form of arXiv 2406.06484, with the decays of arXiv 2412.06464). e is what of a value the state did not hold yet.
The system is solved for the values at hand; its inverse, which a map needs (see `chunk_maps`), is never made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from workbench.kernels.checks import state_dtype
from workbench.kernels.recurrent.fades import Fades, from_here_on

CHUNK = 64
SMALL_CHUNK = 16
"""Where each channel of the state decays by itself, whose fades cost more, and in narrow states, where a chunk's own
products would cost many times as much as those with the state."""
_WIDE = 32


@dataclass(frozen=True)
class Inputs:
    """What a recurrence reads, see `naive_recurrence`; all of the same batch and heads.

    Attributes:
        q, k: [batch, head, position, d]. v: [batch, head, position, width].
        log_decay: [batch, head, position], or [batch, head, position, d]; None for no decay.
        beta: [batch, head, position]; None for no delta rule.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """In which states are kept and chunks computed."""
        return state_dtype(self.q)

    @property
    def chunk(self) -> int:
        """Positions in a chunk, where nobody says."""
        return chunk_length(self.q.shape[-1], self.log_decay)

    def zero_state(self) -> Tensor:
        """[batch, head, d, width] of zeros."""
        b, h, _, d = self.q.shape
        return torch.zeros(b, h, d, self.v.shape[-1], dtype=self.dtype, device=self.q.device)

    def slices(self, chunk: int) -> list[slice]:
        """The positions of each chunk; the last one may be shorter."""
        n = self.q.shape[2]
        return [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]


def chunk_length(d: int, log_decay: Tensor | None) -> int:
    """Positions in a chunk of a state d wide, with these decays."""
    by_channel = log_decay is not None and log_decay.dim() == 4
    return SMALL_CHUNK if by_channel or d < _WIDE else CHUNK


class _Chunk:
    """Some positions of every head, [batch · head, position, ...]."""

    def __init__(self, inputs: Inputs, at: slice) -> None:
        def cut(t: Tensor) -> Tensor:
            return t[:, :, at].to(inputs.dtype).flatten(0, 1)

        self.q, self.k, self.v = cut(inputs.q), cut(inputs.k), cut(inputs.v)
        g, beta = inputs.log_decay, inputs.beta
        # A decay that nobody gave is one of zero: its fades are made of numbers for each position, not each channel.
        fading = self.k.new_zeros(*self.k.shape[:2], 1) if g is None else g[:, :, at].flatten(0, 1)
        self.fades = Fades(fading if fading.dim() == 3 else fading[..., None], inputs.dtype)
        self.beta = None if beta is None else cut(beta)[..., None]

    @cached_property
    def own(self) -> Tensor:
        """P, what each position reads of the chunk's own, [m, i, j]."""
        return self.fades.products(self.q, self.k)

    @cached_property
    def alike(self) -> Tensor:
        """A, what keys share with those before them, [m, i, j]; the diagonal does not count."""
        return self.fades.products(self.k, self.k)

    @cached_property
    def queries(self) -> Tensor:
        """q̂, what is read of the state before."""
        return self.q * self.fades.since

    @cached_property
    def keys(self) -> Tensor:
        """k̂, where the state before is looked up."""
        return self.k * self.fades.since

    @cached_property
    def written_keys(self) -> Tensor:
        """k̃, where the state after has it."""
        return self.k * self.fades.until

    def news(self, state: Tensor) -> Tensor:
        """e, what of each value the state did not hold, [m, position, width]."""
        if self.beta is None:
            return self.v
        missing = torch.baddbmm(self.v, self.keys, state, alpha=-1)
        return torch.linalg.solve_triangular(self.alike * self.beta.mT, missing, upper=False, unitriangular=True)

    def steps(self, news: Tensor) -> Tensor:
        """β e, what is written."""
        return news if self.beta is None else news * self.beta

    def after(self, state: Tensor, written: Tensor) -> Tensor:
        """The state after the chunk."""
        return torch.baddbmm(state * self.fades.whole, self.written_keys.mT, written)


def forward(inputs: Inputs, state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """What is read, [batch, head, position, width] in v's dtype, and the state after the last position.

    Args:
        state: [batch, head, d, width] before the first position; None for zeros.
        chunk: positions per chunk.
    """
    first = inputs.zero_state() if state is None else state
    out = torch.empty_like(inputs.v, memory_format=torch.contiguous_format)
    with torch.no_grad(), torch.autocast(inputs.q.device.type, enabled=False):
        held = first.flatten(0, 1)
        for at in inputs.slices(chunk):
            part = _Chunk(inputs, at)
            written = part.steps(part.news(held))
            found = torch.baddbmm(part.own @ written, part.queries, held)
            out[:, :, at] = found.view(*first.shape[:2], *found.shape[1:])
            held = part.after(held, written)
    return out, held.view(first.shape)


def backward(
    inputs: Inputs, state: Tensor | None, chunk: int, grad_out: Tensor, grad_state: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the inputs there are, by name, and of the initial state, from those of output and final state.

    The states before each chunk are made again and kept; all else is made again chunk by chunk.
    """
    first = inputs.zero_state() if state is None else state
    given = {name: t for name, t in vars(inputs).items() if t is not None}
    found = {name: torch.empty_like(t, memory_format=torch.contiguous_format) for name, t in given.items()}
    going = torch.zeros_like(first) if grad_state is None else grad_state.to(first.dtype)
    with torch.no_grad(), torch.autocast(inputs.q.device.type, enabled=False):
        slices, held, states = inputs.slices(chunk), first.flatten(0, 1), []
        for at in slices:
            states.append(held)
            part = _Chunk(inputs, at)
            held = part.after(held, part.steps(part.news(held)))
        going = going.flatten(0, 1)
        for at, before in zip(reversed(slices), reversed(states), strict=True):
            arrived = grad_out[:, :, at].to(first.dtype).flatten(0, 1)
            of, going = _backward_of(_Chunk(inputs, at), before, arrived, going)
            for name, whole in found.items():
                here = whole[:, :, at]
                here.copy_(of[name].view(here.shape))
    return found, going.view(first.shape)


def _backward_of(part: _Chunk, state: Tensor, grad: Tensor, grad_after: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of one chunk's inputs by name, and of the state before it."""
    fades, beta = part.fades, part.beta
    news = part.news(state)
    written = part.steps(news)
    d_written = torch.baddbmm(part.own.mT @ grad, part.written_keys, grad_after)
    dq, dk, d_logs = fades.gradients(grad @ written.mT, part.own, part.q, part.k)
    d_state = torch.baddbmm(grad_after * fades.whole, part.queries.mT, grad)
    dv, found = d_written, {}
    if beta is not None:
        system = (part.alike * beta).mT  # against time: what is written later has taken from what was before
        reached = torch.linalg.solve_triangular(system, d_written, upper=True, unitriangular=True)
        found["beta"] = (reached * news).sum(-1)
        dv = reached * beta
        erased = fades.gradients((dv @ written.mT).neg_().tril_(-1), part.alike, part.k, part.k)
        dk, d_logs = dk + erased[0] + erased[1], d_logs + erased[2]
        d_state.baddbmm_(part.keys.mT, dv, alpha=-1)
    # What is read of the state before fades up to the position, what is written from there on, the state throughout.
    read = (grad @ state.mT).mul_(fades.since)
    dq += read
    up_to = part.q * read
    if beta is not None:
        looked_up = (dv @ state.mT).mul_(fades.since).neg_()
        dk += looked_up
        up_to += part.k * looked_up
    kept = (written @ grad_after.mT).mul_(fades.until)
    dk += kept
    after = (part.k * kept).cumsum(1).roll(1, 1)
    after[:, 0] = (grad_after * state).sum(-1) * fades.whole.squeeze(-1)
    after[:, 1:] += after[:, :1]
    logs = from_here_on(up_to) + after
    d_logs = d_logs + (logs.sum(-1, keepdim=True) if fades.total.shape[-1] == 1 else logs)
    found |= {"q": dq, "k": dk, "v": dv, "log_decay": d_logs}
    return found, d_state
