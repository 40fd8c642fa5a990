"""What is left within a chunk of a recurrence: fades, made of logarithms of decays, of which none is ever above one."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import threshold

SMALLEST_LOG = -1e4
"""Logarithms of decays are not let below this; the exp of it is zero, and sums of it stay finite."""
LEAF = 8
"""Positions between which each channel's fades are written out."""


def faded(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """exp; what is too small for a normal number is zero, since a CPU takes far longer over subnormal ones."""
    return threshold(exponents.to(dtype).exp(), torch.finfo(dtype).tiny, 0.0)


def from_here_on(t: Tensor) -> Tensor:
    """[..., position, d] sums over each position and all after it."""
    return t.flip(-2).cumsum(-2).flip(-2)


class Fades:
    """How much is left at one position of a chunk of what was there at another; positions are the axis before the last.

    Sums of logarithms and their differences are float64: a decay of nearly nothing early in the chunk would take the
    digits of all that follow it.

    Args:
        log_decay: [..., position, d], or [..., position, 1] where all channels fade alike.

    Attributes:
        total: [..., position, d or 1] float64, Σ log decays from the chunk's start to each position, itself included.
        since: exp of it: what is left at each position of the state before the chunk.
        until: what is left of each position after the chunk's last one.
        whole: [..., d or 1, 1], what is left of the state before the chunk after it.
    """

    def __init__(self, log_decay: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.total = log_decay.double().clamp(min=SMALLEST_LOG).cumsum(-2)
        self.since = faded(self.total, dtype)
        self.until = faded(self.total[..., -1:, :] - self.total, dtype)
        self.whole = self.since[..., -1:, :].mT

    @cached_property
    def between(self) -> Tensor:
        """[..., i, j] what is left of position j ≤ i at position i, else 0; where all channels fade alike."""
        return faded((self.total - self.total.mT).clamp_(max=0), self.dtype).tril_()

    def products(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., i, j] Σ_s x_i[s] y_j[s] times what is left of channel s of j ≤ i at i, else 0, of [..., i, d]."""
        if self.total.shape[-1] == 1:
            return (x @ y.mT).mul_(self.between)
        out = x.new_zeros(*x.shape[:-1], x.shape[-2])
        for rows, columns, since, until in self._parts:
            if until is None:
                left = x[..., rows, :].unsqueeze(-2) * since * y[..., columns, :].unsqueeze(-3)
                out[..., rows, columns] = left.sum(-1)
            else:
                out[..., rows, columns] = (x[..., rows, :] * since) @ (y[..., columns, :] * until).mT
        return out

    def gradients(self, grad: Tensor, made: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of x, y and the log decays [..., position, d or 1], from that of `made`, which is `products(x, y)`.

        Entries of the gradient with j > i do not matter. A position's decay lies between all before it and all from it
        on; what it does not change (a position with itself) is left out and not subtracted again: it can be far larger.
        """
        if self.total.shape[-1] == 1:
            inner = grad * self.between
            crossed = (grad * made).tril_(-1).flip(-2).cumsum_(-2).flip(-2)  # [t, j] Σ over rows i ≥ t
            return inner @ y, inner.mT @ x, crossed.tril_(-1).sum(-1, keepdim=True)
        own = grad.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        grad = grad.tril(-1)
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        for rows, columns, since, until in self._parts:
            part = grad[..., rows, columns]
            if until is None:
                left = part.unsqueeze(-1) * since
                dx[..., rows, :] += (left * y[..., columns, :].unsqueeze(-3)).sum(-2)
                dy[..., columns, :] += (left * x[..., rows, :].unsqueeze(-2)).sum(-3)
            else:
                dx[..., rows, :] += (part @ (y[..., columns, :] * until)) * since
                dy[..., columns, :] += (part.mT @ (x[..., rows, :] * since)) * until
        return dx + own * y, dy + own * x, from_here_on(x * dx - y * dy)

    @cached_property
    def _parts(self) -> list[tuple[slice, slice, Tensor, Tensor | None]]:
        """The lower triangle in parts (rows, columns, fades), where each channel has a fade of its own.

        Squares below the diagonal have a place where their rows and columns meet: what is left is a product of two
        fades, to it and from it, and a matrix product sums over channels. On the diagonal fades are [..., i, j, d].
        """
        found: list[tuple[slice, slice, Tensor, Tensor | None]] = []

        def split(start: int, stop: int) -> None:
            here = slice(start, stop)
            if stop - start <= LEAF:
                total = self.total[..., here, :]
                left = faded((total.unsqueeze(-2) - total.unsqueeze(-3)).clamp_(max=0), self.dtype)
                seen = torch.ones(stop - start, stop - start, dtype=torch.bool, device=total.device).tril_()
                found.append((here, here, left * seen[..., None], None))
                return
            middle = (start + stop + 1) // 2
            meet = self.total[..., middle - 1 : middle, :]
            rows, columns = slice(middle, stop), slice(start, middle)
            since, until = self.total[..., rows, :] - meet, meet - self.total[..., columns, :]
            found.append((rows, columns, faded(since, self.dtype), faded(until, self.dtype)))
            split(start, middle)
            split(middle, stop)

        split(0, self.total.shape[-2])
        return found
