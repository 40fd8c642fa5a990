"""The map of a linear recurrence in chunks: what each reads from the state before it, writes to the one after, keeps.

Within a chunk the delta rule's products (I − β k kᵀ) are one triangular solve (the WY form, arXiv 2406.06484): with
P[i, j] = q_i·k_j and M[i, j] = β_i k_i·k_j, j < i, both decayed from j to i, and T = (I + M)⁻¹,

    y = P T β v + (q̂ − P T k̂) h,    h' = (Φ − k̃ᵀ T k̂) h + k̃ᵀ T β v

where q̂ and k̂ (times β) are faded from the state before the chunk to their position, k̃ from there to the chunk's end,
and Φ over the chunk. Fades are exps of differences of running sums, at most zero: no decay is divided by another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.recurrent.fades import LEAF, Fades

_NUMBERS = 1 << 21  # of fades held at once


@dataclass(frozen=True)
class Chunks:
    """The chunks of every head; the last one is filled up with positions that do nothing.

    Attributes:
        reads: [batch, head, chunk, length, d], what each position reads of the state before its chunk.
        writes: [batch, head, chunk, length, d], what it adds to the state after it.
        within: [batch, head, chunk, length, length], what it reads of the chunk's own positions.
        carry: from the state before a chunk to that after it; [batch, head, chunk, d, d] with a delta rule, else its
            diagonal [batch, head, chunk, d or 1].
    """

    reads: Tensor
    writes: Tensor
    within: Tensor
    carry: Tensor

    @property
    def length(self) -> int:
        """Positions in a chunk."""
        return self.reads.shape[3]

    def of(self, batch: slice, heads: Tensor) -> Chunks:
        """Those of some batch entries and heads."""
        return Chunks(*(t[batch][:, heads] for t in (self.reads, self.writes, self.within, self.carry)))

    def pulled(self, rows: Tensor, chunk: int) -> Tensor:
        """Readings [b, h, row, d] of the state after a chunk as readings of the state before it."""
        carry = self.carry[:, :, chunk]
        return rows * carry[:, :, None] if carry.dim() == 3 else rows @ carry

    def run(self, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What is read of values [b, h, position, width], in the order of positions, and the last state."""
        n, out = values.shape[2], []
        short = -n % self.length
        padded = torch.cat((values, values.new_zeros(*values.shape[:2], short, values.shape[3])), dim=2)
        for number, given in enumerate(padded.split(self.length, dim=2)):
            out.append(self.reads[:, :, number] @ state + self.within[:, :, number] @ given)
            carry = self.carry[:, :, number]
            kept = carry[..., None] * state if carry.dim() == 3 else carry @ state
            state = kept + self.writes[:, :, number].mT @ given
        return torch.cat(out, dim=2)[:, :, :n], state


def map_chunks(q: Tensor, k: Tensor, log_decay: Tensor | None, beta: Tensor | None, length: int) -> Chunks:
    """The chunks of a recurrence; see `naive_recurrence` for the arguments, [batch, head, ...] of one dtype each."""
    b, h, n, _ = q.shape
    short = -n % length

    def cut(t: Tensor) -> Tensor:
        filled = torch.cat((t, t.new_zeros(*t.shape[:2], short, *t.shape[3:])), dim=2) if short else t
        return filled.unflatten(2, (-1, length))

    q, k = cut(q), cut(k)
    g = cut(q.new_zeros(b, h, n) if log_decay is None else log_decay)
    g = g if g.dim() == 5 else g[..., None]
    steps = None if beta is None else cut(beta).to(q.dtype)[..., None]
    at_once = max(1, _NUMBERS // (b * h * length * max(length, LEAF * g.shape[-1])))
    parts = [
        _made(q[:, :, some], k[:, :, some], g[:, :, some], None if steps is None else steps[:, :, some])
        for some in (slice(start, start + at_once) for start in range(0, q.shape[2], at_once))
    ]
    return Chunks(*(each[0] if len(parts) == 1 else torch.cat(each, dim=2) for each in zip(*parts, strict=True)))


def _made(q: Tensor, k: Tensor, log_decay: Tensor, steps: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """reads, writes, within and carry of some chunks."""
    fades = Fades(log_decay, q.dtype)
    since, until, carry = fades.since, fades.until, fades.whole.squeeze(-1)
    reads, within = q * since, fades.products(q, k)
    if steps is None:
        return reads, k * until, within, carry
    length, d = q.shape[-2:]
    erased = k * steps
    system = fades.products(erased, k).tril(-1)
    right = torch.cat((torch.diag_embed(steps.squeeze(-1)), erased * since), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    T, W = solved[..., :length], solved[..., length:]
    writes = T.mT @ (k * until)
    whole = torch.diag_embed(carry.expand(*carry.shape[:-1], d)) - (k * until).mT @ W
    return reads - within @ W, writes, within @ T, whole
