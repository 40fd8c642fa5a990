"""Where the elements of one tensor lie in another that holds them in another order.

Reshaping, permuting and reshaping again sends each axis of a tensor z to strides of the flat result p: an axis is
split into factors, each with a size and a stride. All strides divide p's size, so that few need to be tried; each is
tried on 16 elements, and one full comparison is the proof.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

_SAMPLE = 16  # elements compared at a time: a single value says little in bfloat16
_EFFORT = 200_000  # compared elements after which a search is given up: nearly all values are equal


class Factor(NamedTuple):
    """A part of an axis of z: how many indices, and how far apart these lie in flat p."""

    axis: int
    size: int
    stride: int


@dataclass(frozen=True)
class Placement:
    """One way in which p holds z.

    Attributes:
        factors: in the order of z's elements, the outermost first.
        tried: how many elements were compared before the one full comparison.
    """

    factors: tuple[Factor, ...]
    tried: int

    def of(self, axis: int) -> tuple[Factor, ...]:
        """The factors of one axis of z."""
        return tuple(factor for factor in self.factors if factor.axis == axis)


def placements(z: Tensor, p: Tensor, most: int = 2) -> tuple[Placement, ...] | None:
    """The ways in which `p` is `z` reshaped, permuted and reshaped, up to `most`.

    One is a proof; several: the values do not tell which; none: p is something else. None: the search was given up, as
    nearly all values are equal.

    >>> z = torch.arange(24.).view(2, 3, 4)  # [batch, head, width]
    >>> [placement] = placements(z, z.transpose(0, 1).reshape(3, 8))
    >>> placement.factors
    (Factor(axis=0, size=2, stride=4), Factor(axis=1, size=3, stride=8), Factor(axis=2, size=4, stride=1))
    """
    if z.numel() != p.numel() or z.numel() < 2:
        return ()
    z, p = (t.detach().to(p.device, p.dtype) for t in (z, p))
    if bool(p.isnan().any()):  # rows without a key, in some kernels; nothing equals them
        z, p = z.nan_to_num(), p.nan_to_num()
    search = _Search(z, p.reshape(-1).contiguous(), most)
    search.extend(z.dim() - 1, 1, [])
    return None if search.tried >= _EFFORT else tuple(search.found)


class _Search:
    """Depth first, from z's innermost axis outwards."""

    def __init__(self, z: Tensor, flat: Tensor, most: int) -> None:
        self.flat, self.rows, self.shape, self.most = flat, z.reshape(-1), tuple(z.shape), most
        self.found: list[Placement] = []
        self.tried = 0
        self._divisors = divisors(flat.numel())
        self._pick = torch.Generator().manual_seed(0)

    def extend(self, axis: int, covered: int, factors: list[Factor]) -> None:
        """`factors`, innermost first, place the axes after `axis`, and `covered` indices of that one."""
        while axis >= 0 and covered == self.shape[axis]:
            axis, covered = axis - 1, 1
        if axis < 0:
            self._prove(factors)
            return
        inner = 1
        for factor in factors:
            inner *= factor.size
        some = torch.randint(inner, (min(inner, _SAMPLE),), generator=self._pick)
        places, rest = torch.zeros_like(some), some
        for factor in factors:
            places, rest = places + rest % factor.size * factor.stride, rest // factor.size
        reach, some, places = int(places.max()), some.to(self.flat.device), places.to(self.flat.device)
        wanted = self.rows[inner + some]
        for stride in self._divisors:
            if self._taken(stride, covered, factors) or stride + reach >= self.flat.numel():
                continue
            self.tried += len(some)
            if not torch.equal(self.flat[stride + places], wanted):
                continue
            for size in reversed(self._divisors):
                if not self._fits(axis, covered, size, stride, factors):
                    continue
                self.tried += size
                steps = torch.arange(size, device=self.flat.device)
                same = torch.equal(self.flat[steps * stride + places[0]], self.rows[steps * inner + some[0]])
                if same and len(self.found) < self.most and self.tried < _EFFORT:
                    self.extend(axis, covered * size, [*factors, Factor(axis, size, stride)])

    def _taken(self, stride: int, covered: int, factors: list[Factor]) -> bool:
        """Whether other factors lie at this stride, or it only goes on with the one before, which is no new factor."""
        goes_on = covered > 1 and stride == factors[-1].stride * factors[-1].size
        return goes_on or any(f.stride <= stride < f.stride * f.size for f in factors)

    def _fits(self, axis: int, covered: int, size: int, stride: int, factors: list[Factor]) -> bool:
        """Whether a factor of that size leaves room for what is left of the axis and does not overlap others."""
        if size < 2 or self.shape[axis] // covered % size or self.flat.numel() % (stride * size):
            return False
        apart = (f.stride % (stride * size) == 0 if stride < f.stride else stride % (f.stride * f.size) == 0
                 for f in factors)  # fmt: skip
        return all(apart)

    def _prove(self, factors: list[Factor]) -> None:
        ordered = tuple(reversed(factors))
        sizes = [factor.size for factor in ordered]
        placed = self.flat.as_strided(sizes, [factor.stride for factor in ordered])
        if torch.equal(placed, self.rows.view(sizes)):
            self.found.append(Placement(ordered, self.tried))


def divisors(n: int) -> list[int]:
    """All divisors of a number, the smallest first.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
