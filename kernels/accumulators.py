"""One small class per statistic: it sees every tile of a pattern once and keeps O(queries + keys) numbers.

Sums run in the pattern's dtype, over partial sums of one tile each; only what cancels (distances) runs in float64. What
they give are raw sums; `finishing.py` makes statistics of them.

Where a row's denominator is not known yet, tiles hold exp(score − lead) with a lead that rises; `rescale` then puts
what was collected on the new scale, and `normalise` divides by the denominator in the end (the online softmax).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.masks import MaskSummary
from workbench.kernels.statistics import Options, previous_copies

LOG_FLOOR = {torch.float32: -43.0, torch.float64: -300.0}
"""ln p is not let below this in a tile. Weights and their squares then stay normal numbers: a CPU takes 10 to 100 times
longer over subnormal ones. What it adds (2e-19 a key in float32) is far below the rounding of any statistic."""
_BAND = 64  # keys


@dataclass
class Tile:
    """A rectangle of a pattern.

    Attributes:
        p: [b, h, q, k] weights; zero, or at the floor, where hidden.
        log_p: same shape, ln p, at its floor where hidden; None unless asked for. The first accumulators (entropy) may
            use it up; after them it is scratch space.
        batch, heads, queries, keys: where the rectangle lies.
        offset: absolute position of query row 0.
    """

    p: Tensor
    log_p: Tensor | None
    batch: slice
    heads: slice
    queries: slice
    keys: slice
    offset: int

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
    """The map that is streamed: its sizes, where its numbers live, what its mask lets through."""

    n_batch: int
    n_heads: int
    n_queries: int
    n_keys: int
    offset: int
    device: torch.device
    dtype: torch.dtype
    seen: MaskSummary
    causal: bool

    def per_query(self, fill: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """A [batch, head, query] accumulator, in the pattern's dtype unless told otherwise."""
        shape = (self.n_batch, self.n_heads, self.n_queries)
        return torch.full(shape, fill, dtype=dtype or self.dtype, device=self.device)

    def alive(self, value: Tensor, dead: float = torch.nan) -> Tensor:
        """The value in the pattern's dtype, `dead` in rows that see no key."""
        value = value.to(self.dtype)
        return torch.where(self.seen.keys_per_query > 0, value, torch.full_like(value, dead))


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


class Accumulator(ABC):
    """Collects one statistic, or several that share their work."""

    wants_log = False

    def __init__(self, space: Space, options: Options) -> None:
        self.space, self.options = space, options

    @abstractmethod
    def add(self, tile: Tile) -> None:
        """Take one tile into account."""

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """The raw sums, by name."""

    def rescale(self, rows: Rows, online: Online) -> None:
        """Put what these rows have collected on a new scale; only row statistics can be."""
        raise AssertionError(f"{type(self).__name__} needs the denominators first")

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Divide by the denominators [batch, head, query]; `mass` is the part of them that is due to keys."""
        raise AssertionError(f"{type(self).__name__} needs the denominators first")


class RowSum(Accumulator):
    """A statistic that is a sum over the weights of a row."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.total = space.per_query()

    def rescale(self, rows: Rows, online: Online) -> None:
        """Sums of weights scale as weights do."""
        self.total[rows] *= online.factor

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Sums of weights are normalised as weights are."""
        self.total /= denominator


class Entropy(RowSum):
    """−Σ p ln p; overwrites the tile's log_p."""

    wants_log = True

    def add(self, tile: Tile) -> None:
        assert tile.log_p is not None
        self.total[tile.rows].sub_(tile.log_p.mul_(tile.p).sum(-1))

    def rescale(self, rows: Rows, online: Online) -> None:
        """Every ln p moves by the shift too."""
        self.total[rows] = (self.total[rows] - online.shift * online.mass) * online.factor

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Every ln p loses the logarithm of the denominator."""
        self.total = (self.total + denominator.log() * mass) / denominator

    def results(self) -> dict[str, Tensor]:
        return {"entropy": self.total}


class EffectiveKeys(RowSum):
    """1 / Σ p²."""

    def add(self, tile: Tile) -> None:
        self.total[tile.rows].add_(torch.linalg.vector_norm(tile.p, dim=-1).square_())

    def rescale(self, rows: Rows, online: Online) -> None:
        """Squares of weights."""
        self.total[rows] *= online.factor.square()

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Squares of weights."""
        self.total /= denominator.square()

    def results(self) -> dict[str, Tensor]:
        return {"effective_keys": 1 / self.total}


class Peak(Accumulator):
    """Largest weight of a row and its key; the first of equal ones."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.best = space.per_query(-1.0)
        self.key = space.per_query(-1, torch.long)
        place = torch.arange(space.n_keys, dtype=space.dtype, device=space.device)
        self._places = torch.stack((torch.ones_like(place), place))

    def add(self, tile: Tile) -> None:
        weight = tile.p.amax(-1)
        better = weight > self.best[tile.rows]
        if not bool(better.any()):
            return
        # Where the largest weight is, by products: how many keys have it, and the sum of their places. That takes a
        # third of the time of an argmax; only rows in which several keys have it need one.
        here = torch.eq(tile.p, weight[..., None], out=tile.scratch()).flatten(0, -2)
        count, key = (self._places[:, : here.shape[-1]] @ here.T).unflatten(-1, weight.shape)
        tied = better & (count != 1)
        if bool(tied.any()):
            key[tied] = tile.p[tied].argmax(-1).to(key.dtype)
        self.best[tile.rows] = torch.where(better, weight, self.best[tile.rows])
        self.key[tile.rows] = torch.where(better, key.long() + tile.keys.start, self.key[tile.rows])

    def rescale(self, rows: Rows, online: Online) -> None:
        """The key stays; -1, which stands for none yet, shrinks and is still less than any weight."""
        self.best[rows] *= online.factor

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """A weight."""
        self.best /= denominator

    def results(self) -> dict[str, Tensor]:
        return {"peak": self.best, "peak_key": self.key}


class Distance(Accumulator):
    """Mean and variance of |i−j|, from moments of the key's place within narrow bands of keys.

    Single-precision sums of squares of whole positions would lose the variance of a narrow row to rounding. Within a
    band of 64 keys the places are at most 32 from its middle; what the bands give is put together in float64. One
    product per tile gives all of it.
    """

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.mass, self.first, self.second = (space.per_query(dtype=torch.float64) for _ in range(3))
        self._position = torch.arange(space.n_queries, dtype=torch.float64, device=space.device) + space.offset
        self._of_width: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, tile: Tile) -> None:
        low = tile.queries.start + tile.offset
        behind = tile.keys.stop - 1 <= low or self.space.causal  # keys after the query weigh nothing there
        ahead = tile.keys.start >= tile.queries.stop - 1 + tile.offset
        if not behind and not ahead:
            self._add_straddling(tile)
            return
        if tile.p.shape[-1] not in self._of_width:
            self._of_width[tile.p.shape[-1]] = _bands(tile.p.shape[-1], tile.p)
        bands, joined = self._of_width[tile.p.shape[-1]]
        moments = joined @ (bands @ tile.p.flatten(0, -2).T).double()
        mass, place, square = moments.unflatten(-1, tile.p.shape[:-1])
        away = self._position[tile.queries] - tile.keys.start
        first = away * mass - place
        self.mass[tile.rows] += mass
        self.first[tile.rows] += first if behind else -first
        self.second[tile.rows] += away * (first - place) + square

    def _add_straddling(self, tile: Tile) -> None:
        """A tile with keys on both sides of its queries."""
        i, j = tile.positions()
        away = (i - j).abs()
        local = away.to(tile.p.dtype)
        mass = tile.p.sum(-1)
        centre = tile.product(local).sum(-1) / mass.clamp(min=torch.finfo(tile.p.dtype).tiny)
        scratch = tile.scratch()
        torch.sub(local, centre[..., None], out=scratch)
        spread = scratch.square_().mul_(tile.p).sum(-1).double()
        mass, centre = mass.double(), centre.double()
        self.mass[tile.rows] += mass
        self.first[tile.rows] += mass * centre
        self.second[tile.rows] += spread + mass * centre * centre

    def rescale(self, rows: Rows, online: Online) -> None:
        """Sums of weights."""
        for total in (self.mass, self.first, self.second):
            total[rows] *= online.factor

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Mean and variance are per unit of mass already."""

    def results(self) -> dict[str, Tensor]:
        mean = self.first / self.mass
        return {"distance": mean, "distance_var": self.second / self.mass - mean * mean}


def _bands(width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices [3 · band, key] and [3, 3 · band] that give mass, Σ p·j and Σ p·j² of a tile in two steps."""
    j = torch.arange(width, device=like.device)
    band = j // _BAND
    n = int(band[-1]) + 1
    place = (j - band * _BAND - _BAND // 2).double()
    member = torch.nn.functional.one_hot(band, n).double()
    moments = torch.cat([member * (place**power)[:, None] for power in range(3)], dim=1)
    middle = torch.arange(n, device=like.device).double() * _BAND + _BAND // 2
    one, nothing = torch.ones_like(middle), torch.zeros_like(middle)
    joined = torch.cat(
        [
            torch.stack((one, middle, middle**2), dim=1),
            torch.stack((nothing, one, 2 * middle), dim=1),
            torch.stack((nothing, nothing, one), dim=1),
        ]
    )
    return moments.T.contiguous().to(like.dtype), joined.T.contiguous()


class WeightAt(RowSum):
    """Weight on one key per row, whose index is given as [batch or 1, head or 1, query]; outside the map: 0."""

    def __init__(self, space: Space, options: Options, name: str, target: Callable[[Space], Tensor]) -> None:
        super().__init__(space, options)
        self.name = name
        self.target = target(space).expand(space.n_batch, space.n_heads, space.n_queries)
        flat = self.target.reshape(-1, space.n_queries)
        self.low, self.high = flat.amin(0).cpu(), flat.amax(0).cpu()

    def add(self, tile: Tile) -> None:
        low, high = self.low[tile.queries].min(), self.high[tile.queries].max()
        if high < tile.keys.start or low >= tile.keys.stop:
            return
        index = self.target[tile.rows] - tile.keys.start
        inside = (index >= 0) & (index < tile.p.shape[-1])
        weight = tile.p.gather(-1, index.clamp(0, tile.p.shape[-1] - 1)[..., None]).squeeze(-1)
        self.total[tile.rows].add_(weight * inside)

    def results(self) -> dict[str, Tensor]:
        return {self.name: self.total}


class WeightOnSet(RowSum):
    """Joint weight on given keys (`sink` with `sink_keys`)."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        keys = options.sinks(space.n_keys)
        self.member = torch.zeros(space.n_keys, dtype=space.dtype, device=space.device)
        self.member[keys] = 1

    def add(self, tile: Tile) -> None:
        self.total[tile.rows].add_(tile.p @ self.member[tile.keys])

    def results(self) -> dict[str, Tensor]:
        return {"sink": self.total}


class Induction(RowSum):
    """Weight on keys that follow an earlier copy of the query's token."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.ids = options.ids(space.n_batch, space.n_queries, space.n_keys).to(space.device)

    def add(self, tile: Tile) -> None:
        if tile.keys.start > tile.queries.stop - 1:
            return
        copies = previous_copies(self.ids[tile.batch], tile.queries, tile.keys)
        self.total[tile.rows].add_(tile.product(copies[:, None]).sum(-1))

    def results(self) -> dict[str, Tensor]:
        return {"induction": self.total}


class Received(Accumulator):
    """Σ over queries of the weight on each key."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.total = torch.zeros(space.n_batch, space.n_heads, space.n_keys, dtype=space.dtype, device=space.device)

    def add(self, tile: Tile) -> None:
        self.total[tile.batch, tile.heads, tile.keys].add_(tile.p.sum(-2))

    def results(self) -> dict[str, Tensor]:
        return {"received": self.total}


class TopKeys(Accumulator):
    """The n largest weights of a row and their keys, exact: each tile's best are merged with the best so far."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.n = min(options.n_top, space.n_keys)
        shape = (space.n_batch, space.n_heads, space.n_queries, self.n)
        self.weight = torch.zeros(shape, dtype=space.dtype, device=space.device)
        self.index = torch.full(shape, -1, dtype=torch.long, device=space.device)

    def add(self, tile: Tile) -> None:
        weight, index = tile.p.topk(min(self.n, tile.p.shape[-1]), dim=-1)
        weight = torch.cat((self.weight[tile.rows], weight), -1)
        index = torch.cat((self.index[tile.rows], index + tile.keys.start), -1)
        self.weight[tile.rows], order = weight.topk(self.n, dim=-1)
        self.index[tile.rows] = index.gather(-1, order)

    def rescale(self, rows: Rows, online: Online) -> None:
        """Weights; the order stays."""
        self.weight[rows] *= online.factor[..., None]

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Weights."""
        self.weight /= denominator[..., None]

    def results(self) -> dict[str, Tensor]:
        return {"top_keys_index": self.index, "top_keys_weight": self.weight}


class Pooled(Accumulator):
    """Mass and largest weight per block of queries and keys; tiles start on block edges."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.size = options.block
        shape = (space.n_batch, space.n_heads, -(-space.n_queries // self.size), -(-space.n_keys // self.size))
        self.sum = torch.zeros(shape, dtype=torch.float64, device=space.device)
        self.max = torch.zeros(shape, dtype=space.dtype, device=space.device)

    def add(self, tile: Tile) -> None:
        size = self.size
        m, n = tile.p.shape[-2:]
        p = torch.nn.functional.pad(tile.p, (0, -n % size, 0, -m % size)) if n % size or m % size else tile.p
        blocks = p.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
        q0, k0 = tile.queries.start // size, tile.keys.start // size
        at = (tile.batch, tile.heads, slice(q0, q0 + blocks.shape[2]), slice(k0, k0 + blocks.shape[4]))
        self.sum[at] += blocks.sum((-1, -3))
        self.max[at] = torch.maximum(self.max[at], blocks.amax((-1, -3)))

    def results(self) -> dict[str, Tensor]:
        return {"pooled_sum": self.sum, "pooled_max": self.max}


def build(names: list[str], space: Space, options: Options) -> list[Accumulator]:
    """The accumulators that produce these statistics; those that need log p come first."""
    position = torch.arange(space.n_queries, device=space.device) + space.offset
    wanted: dict[str, Callable[[], Accumulator]] = {}
    for name in names:
        if name == "entropy":
            wanted[name] = lambda: Entropy(space, options)
        elif name == "effective_keys":
            wanted[name] = lambda: EffectiveKeys(space, options)
        elif name in ("peak", "peak_key"):
            wanted["peak"] = lambda: Peak(space, options)
        elif name in ("distance", "distance_var"):
            wanted["distance"] = lambda: Distance(space, options)
        elif name == "sink" and options.sink_keys is not None:
            wanted[name] = lambda: WeightOnSet(space, options)
        elif name == "sink":
            wanted[name] = lambda: WeightAt(space, options, "sink", lambda s: s.seen.first_key)
        elif name == "current":
            wanted[name] = lambda: WeightAt(space, options, "current", lambda s: position)
        elif name == "previous":
            wanted[name] = lambda: WeightAt(space, options, "previous", lambda s: position - 1)
        elif name == "induction":
            wanted[name] = lambda: Induction(space, options)
        elif name in ("received", "received_mean"):
            wanted["received"] = lambda: Received(space, options)
        elif name == "top_keys":
            wanted[name] = lambda: TopKeys(space, options)
        elif name in ("pooled_mean", "pooled_max"):
            wanted["pooled"] = lambda: Pooled(space, options)
    return sorted((make() for make in wanted.values()), key=lambda a: not a.wants_log)
