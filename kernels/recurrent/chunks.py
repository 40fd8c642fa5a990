"""A linear recurrence cut into chunks: what each reads from the state before it, writes to the one after, and keeps.

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

SMALLEST_LOG = -1e4
"""Logarithms of decays are not let below this; the exp of it is zero, and sums of it stay finite."""
_NUMBERS = 1 << 21  # held at once where fades are made for each channel


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

    def after(self, state: Tensor, chunk: int, values: Tensor) -> Tensor:
        """The state [b, h, d, width] after a chunk, from the one before and its values [b, h, length, width]."""
        carry = self.carry[:, :, chunk]
        kept = carry[..., None] * state if carry.dim() == 3 else carry @ state
        return kept + self.writes[:, :, chunk].mT @ values


def chunked(q: Tensor, k: Tensor, log_decay: Tensor | None, beta: Tensor | None, length: int) -> Chunks:
    """The chunks of a recurrence; see `naive_recurrence` for the arguments, [batch, head, ...] of one dtype each."""
    b, h, n, d = q.shape
    short = -n % length

    def cut(t: Tensor) -> Tensor:
        filled = torch.cat((t, t.new_zeros(*t.shape[:2], short, *t.shape[3:])), dim=2) if short else t
        return filled.unflatten(2, (-1, length))

    q, k = cut(q), cut(k)
    if log_decay is None:
        log_decay = q.new_zeros(b, h, n)
    log_decay = log_decay if log_decay.dim() == 4 else log_decay[..., None]
    total = cut(log_decay.double().clamp(min=SMALLEST_LOG)).cumsum(3)  # [b, h, chunk, length, d or 1]
    since, until = (_faded(x, q.dtype) for x in (total, total[..., -1:, :] - total))
    carry = since[..., -1, :]
    reads, within = q * since, _decayed(q, k, total)
    if beta is None:
        return Chunks(reads, k * until, within, carry)
    steps = cut(beta).to(q.dtype)[..., None]
    erased = k * steps
    system = _decayed(erased, k, total).tril(-1)
    right = torch.cat((torch.diag_embed(steps.squeeze(-1)), erased * since), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    T, W = solved[..., :length], solved[..., length:]
    writes = T.mT @ (k * until)
    whole = torch.diag_embed(carry.expand(*carry.shape[:-1], d)) - (k * until).mT @ W
    return Chunks(reads - within @ W, writes, within @ T, whole)


def _faded(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """exp; what is too small for a normal number is zero, since a CPU takes far longer over subnormal ones."""
    found = exponents.clamp(max=0).to(dtype).exp()
    return torch.where(found < torch.finfo(dtype).tiny, 0.0, found)


def _decayed(x: Tensor, y: Tensor, total: Tensor) -> Tensor:
    """[..., i, j] Σ_s x_i[s] exp(G_i[s] − G_j[s]) y_j[s] for j ≤ i, else 0, within each chunk."""
    if total.shape[-1] == 1:
        away = total - total.mT
        return (x @ y.mT * _faded(away, x.dtype)).tril()
    length, d = x.shape[-2:]
    out = torch.empty(*x.shape[:-1], length, dtype=x.dtype, device=x.device).flatten(0, -3)
    xs, ys, totals = (t.flatten(0, -3) for t in (x, y, total))
    at_once = max(1, _NUMBERS // (length * length * d))
    for start in range(0, len(out), at_once):
        some = slice(start, start + at_once)
        left = _faded(totals[some, :, None] - totals[some, None], x.dtype)
        out[some] = torch.einsum("cis,cijs,cjs->cij", xs[some], left, ys[some])
    return out.tril_().view(*x.shape[:-1], length)
