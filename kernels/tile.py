"""What accumulators are given: tiles of a pattern, the map they lie in, and how the scale of rows changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.mask_summary import MaskSummary
from workbench.kernels.masks import Mask

BITS = 1 / math.log(2)
"""Tiles take logarithms to base 2: on a CPU torch's exp takes three times as long as its exp2."""
LOG_FLOOR = {torch.float32: -62.0, torch.float64: -430.0}
"""log₂ p is not let below this in a tile. Weights and their squares then stay normal numbers: a CPU takes 10 to 100
times longer over subnormal ones. What it adds (2e-19 a key in float32) is far below the rounding of any statistic."""


class Buffers:
    """Room for several tiles, used again and again, in one large allocation.

    An allocator returns to the system what exceeds a multiple of the largest piece that it was ever given back, and the
    page faults of the next pass may then take as long as a third of it. Room that is never touched costs nothing.
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self._n = n
        self._room = torch.empty(_ROOM if device.type == "cpu" else 0, dtype=dtype, device=device)

    def views(self, shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Contiguous tensors of this shape; those that were given out before share their room."""
        size = math.prod(shape)
        step = -(-size // 16) * 16  # on a cache line
        if self._room.numel() < self._n * step:
            self._room = self._room.new_empty(self._n * step)
        return tuple(self._room[i * step : i * step + size].view(*shape) for i in range(self._n))


_ROOM = 1 << 22  # numbers


@dataclass
class Tile:
    """A rectangle of a pattern.

    Attributes:
        p: [b, h, q, k] weights; zero, or at the floor, where hidden.
        log_p: same shape, log₂ p, at its floor where hidden; None unless asked for. The first accumulators (entropy)
            may use it up; after them it is scratch space.
        batch, heads, queries, keys: where the rectangle lies.
        offset: absolute position of query row 0.
        again: makes its `p` once more, to the bit, where the tile has been overwritten by a later one.
    """

    p: Tensor
    log_p: Tensor | None
    batch: slice
    heads: slice
    queries: slice
    keys: slice
    offset: int
    again: Callable[[], Tensor]

    @property
    def rows(self) -> tuple[slice, slice, slice]:
        """Index of these rows in a [batch, head, query, ...] tensor."""
        return self.batch, self.heads, self.queries

    def scratch(self) -> Tensor:
        """A buffer like p: log_p where it is there, since a fresh buffer costs more than the arithmetic on it."""
        return torch.empty_like(self.p) if self.log_p is None else self.log_p

    def product(self, other: Tensor) -> Tensor:
        """p · other, in the scratch buffer."""
        return torch.mul(self.p, other, out=self.scratch())

    def positions(self) -> tuple[Tensor, Tensor]:
        """Absolute query positions [q, 1] and key positions [1, k]."""
        i = torch.arange(self.queries.start, self.queries.stop, device=self.p.device)[:, None] + self.offset
        return i, torch.arange(self.keys.start, self.keys.stop, device=self.p.device)[None, :]


@dataclass(frozen=True)
class Space:
    """The map that is streamed: its sizes, its mask and what that lets through, where its numbers live.

    Attributes:
        all_see: every query is known to see a key, without looking.
    """

    n_batch: int
    n_heads: int
    n_queries: int
    n_keys: int
    mask: Mask
    seen: MaskSummary
    device: torch.device
    dtype: torch.dtype
    all_see: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        return self.n_batch, self.n_heads, self.n_queries, self.n_keys

    @property
    def offset(self) -> int:
        """Absolute position of query row 0."""
        return self.mask.offset

    def per_query(self, fill: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """A [batch, head, query] accumulator, in the pattern's dtype unless told otherwise."""
        shape = (self.n_batch, self.n_heads, self.n_queries)
        return torch.full(shape, fill, dtype=dtype or self.dtype, device=self.device)

    def alive(self, value: Tensor, dead: float = torch.nan) -> Tensor:
        """The value in the pattern's dtype (integers stay), `dead` in rows that see no key."""
        value = self.typed(value)
        if self.all_see:
            return value
        return torch.where(self.seen.sees, value, dead if value.is_floating_point() else int(dead))

    def without_floor(self, weight: Tensor) -> Tensor:
        """Single weights, zero where they do not exceed the floor that tiles give to hidden keys."""
        return torch.where(weight > 1.01 * 2.0 ** LOG_FLOOR[self.dtype], weight, 0.0)

    def typed(self, value: Tensor) -> Tensor:
        """The value in the pattern's dtype; integers stay."""
        return value.to(self.dtype) if value.is_floating_point() else value


Rows = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Online:
    """How the scale of some rows changes, all [b, h, q].

    Attributes:
        factor: by which weights shrink. shift: its logarithm. mass: what the rows had collected before.
    """

    factor: Tensor
    shift: Tensor
    mass: Tensor
