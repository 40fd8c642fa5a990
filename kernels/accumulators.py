"""One small class per statistic: it sees every tile of a pattern once and keeps O(queries + keys) numbers.

Sums run in the pattern's dtype, over partial sums of one tile each; only what cancels (distances) runs in float64. What
they give are raw sums; `finishing.py` makes statistics of them.

Tiles come in strips: what the same rows see. Per tile only its large operations run; what they give is put together
once per strip, in `close`, since a hundred operations on small tensors cost as much as the products.

Where a row's denominator is not known yet, tiles hold exp(score − lead) with a lead that rises; `rescale` then puts
what was collected on the new scale, and `normalise` divides by the denominator in the end (the online softmax).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.kernels.statistics import Options, previous_copies
from workbench.kernels.tile import Online, Rows, Space, Tile

_BAND = 64  # keys


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

    def close(self, rows: Rows) -> None:  # noqa: B027 - most that need it override it
        """Put together what the tiles of these rows gave."""

    def rescale(self, rows: Rows, online: Online) -> None:
        """Put what these rows have collected on a new scale; only row statistics can be."""
        raise AssertionError(f"{type(self).__name__} needs the denominators first")

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Divide by the denominators [batch, head, query]; `mass` is the part of them that is due to keys."""
        raise AssertionError(f"{type(self).__name__} needs the denominators first")


class RowSum(Accumulator):
    """A statistic that is a sum over the weights of a row; tiles leave their parts [b, h, q] in `parts`."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.total = space.per_query()
        self.parts: list[Tensor] = []

    def close(self, rows: Rows) -> None:
        """Add the parts."""
        if self.parts:
            self.total[rows].add_(self.parts[0] if len(self.parts) == 1 else torch.stack(self.parts).sum(0))
            self.parts.clear()

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
        self.parts.append(tile.log_p.mul_(tile.p).sum(-1))

    def close(self, rows: Rows) -> None:
        """The parts are bits, and negative."""
        if self.parts:
            self.total[rows].sub_(torch.stack(self.parts).sum(0), alpha=math.log(2))
            self.parts.clear()

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
        self.parts.append(torch.linalg.vector_norm(tile.p, dim=-1))

    def close(self, rows: Rows) -> None:
        """The parts are norms."""
        if self.parts:
            self.total[rows].add_(torch.stack(self.parts).square_().sum(0))
            self.parts.clear()

    def rescale(self, rows: Rows, online: Online) -> None:
        """Squares of weights."""
        self.total[rows] *= online.factor.square()

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Squares of weights."""
        self.total /= denominator.square()

    def results(self) -> dict[str, Tensor]:
        return {"effective_keys": 1 / self.total}


class Peak(Accumulator):
    """Largest weight of a row and its key; the first of equal ones.

    Per tile only the largest weight of each row is found, and, place by place, the larger of the tile's weights and
    those of the tiles before it. The first says in which tile the row's largest weight lies, the second at which place
    of a tile. A product finds that place in a third of the time of an argmax: how many places hold the weight, and
    their sum. Only rows in which several do need an argmax, of a tile made again.
    """

    def __init__(self, space: Space, options: Options, width: int) -> None:
        super().__init__(space, options)
        self.best = space.per_query(-1.0)
        self.key = space.per_query(-1, torch.long)
        place = torch.arange(width, dtype=space.dtype, device=space.device)
        self._places = torch.stack((torch.ones_like(place), place))
        self._by_place = torch.empty(0, dtype=space.dtype, device=space.device)
        self._tiles: list[tuple[Tensor, Tile]] = []

    def add(self, tile: Tile) -> None:
        if not self._tiles:
            if self._by_place.shape != tile.p.shape:
                self._by_place = torch.empty_like(tile.p)
            self._by_place.copy_(tile.p)
        else:  # of a strip's tiles, only the last may be narrower
            largest = self._by_place[..., : tile.p.shape[-1]]
            torch.maximum(largest, tile.p, out=largest)
        self._tiles.append((tile.p.amax(-1), tile))

    def close(self, rows: Rows) -> None:
        """The first tile with the row's largest weight, and the first key in it."""
        if not self._tiles:
            return
        weights, tiles = zip(*self._tiles, strict=True)
        self._tiles.clear()
        weight, which = torch.stack(weights).max(0)
        here = self._by_place.eq_(weight[..., None])
        count, place = (self._places[:, : here.shape[-1]] @ here.mT).unbind(-2)
        start = torch.tensor([tile.keys.start for tile in tiles], device=weight.device)
        key = start.take(which).add_(place.long())
        best = self.best[rows]
        better = weight > best
        tied = better & (count != 1)
        if bool(tied.any()):
            for index in which[tied].unique().tolist():
                these = tied & (which == index)
                key[these] = tiles[index].again()[these].argmax(-1) + tiles[index].keys.start
        self.key[rows] = torch.where(better, key, self.key[rows])
        torch.maximum(best, weight, out=best)

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
    band of 64 keys the places are at most 32 from its middle; what the bands give is put together in float64. Their
    moments are products head by head: as one product of all rows it would be too thin to be shared among threads.
    """

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.total = torch.stack([space.per_query(dtype=torch.float64)] * 3)  # mass, Σ p·|i−j|, Σ p·(i−j)²
        self._row = torch.arange(space.n_queries, dtype=torch.float64, device=space.device)
        place = torch.arange(_BAND, dtype=space.dtype, device=space.device) - _BAND // 2
        self._powers = torch.stack((torch.ones_like(place), place, place * place))
        self._behind: list[tuple[Tensor, int]] = []
        self._ahead: list[tuple[Tensor, int]] = []

    def add(self, tile: Tile) -> None:
        low = tile.queries.start + tile.offset
        behind = tile.keys.stop - 1 <= low or self.space.causal  # keys after the query weigh nothing there
        ahead = tile.keys.start >= tile.queries.stop - 1 + tile.offset
        if not behind and not ahead:
            self._add_straddling(tile)
            return
        found = self._behind if behind else self._ahead
        whole = tile.p.shape[-1] // _BAND * _BAND
        if whole:
            bands = tile.p[..., :whole].unflatten(-1, (-1, _BAND))  # [b, h, q, band, place]
            moments = (self._powers @ bands.flatten(2, 3).mT).unflatten(-1, bands.shape[2:4])
            found.append((moments, tile.keys.start))
        if whole < tile.p.shape[-1]:
            rest = tile.p[..., whole:]
            moments = self._powers[:, : rest.shape[-1]] @ rest.mT
            found.append((moments[..., None], tile.keys.start + whole))

    def close(self, rows: Rows) -> None:
        """Moments about the middle of each band become moments about the first query, then of the distance."""
        first_query = rows[2].start + self.space.offset
        away = self._row[: rows[2].stop - rows[2].start]
        for sign, found in ((1, self._behind), (-1, self._ahead)):
            if not found:
                continue
            moments = torch.cat([each for each, _ in found], -1).double()  # [b, h, moment, q, band]
            middle = moments.new_tensor(
                [start + _BAND * i + _BAND // 2 - first_query for each, start in found for i in range(each.shape[-1])]
            )
            found.clear()
            powers = torch.stack((torch.ones_like(middle), middle, middle * middle))
            sums = (powers @ moments.flatten(0, -2).T).unflatten(-1, moments.shape[:-1])  # [power, b, h, moment, q]
            one, first, second = sums.unbind(0)
            mass, place = one[:, :, 0], first[:, :, 0] + one[:, :, 1]
            square = second[:, :, 0] + 2 * first[:, :, 1] + one[:, :, 2]
            distance = sign * (away * mass - place), away * (away * mass - 2 * place) + square
            self.total[(slice(None), *rows)].add_(torch.stack((mass, *distance)))

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
        first = mass * centre
        self.total[(slice(None), *tile.rows)].add_(torch.stack((mass, first, spread + first * centre)))

    def rescale(self, rows: Rows, online: Online) -> None:
        """Sums of weights."""
        self.total[(slice(None), *rows)] *= online.factor

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Mean and variance are per unit of mass already."""

    def results(self) -> dict[str, Tensor]:
        mass, first, second = self.total
        mean = first / mass
        return {"distance": mean, "distance_var": second / mass - mean * mean}


class OnDiagonal(RowSum):
    """Weight on the key that lies `back` before each row's own position (`current`, `previous`)."""

    def __init__(self, space: Space, options: Options, name: str, back: int) -> None:
        super().__init__(space, options)
        self.name, self.back = name, back

    def add(self, tile: Tile) -> None:
        diagonal = tile.queries.start + tile.offset - self.back - tile.keys.start  # the key of the tile's first row
        n_queries, n_keys = tile.p.shape[-2:]
        if -n_queries < diagonal < n_keys:
            weight = tile.p.diagonal(diagonal, -2, -1)
            first = max(0, -diagonal)
            self.parts.append(pad(weight, (first, n_queries - first - weight.shape[-1])))

    def results(self) -> dict[str, Tensor]:
        return {self.name: self.total}


class OnFirstKey(RowSum):
    """Weight on the first key that each row sees (`sink`)."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.key = space.seen.first_key.expand(space.n_batch, space.n_heads, space.n_queries)
        self._rows: Rows | None = None
        self._range = (0, 0)

    def add(self, tile: Tile) -> None:
        if tile.rows != self._rows:
            low, high = torch.aminmax(self.key[tile.rows])
            self._rows, self._range = tile.rows, (int(low), int(high))
        low, high = (key - tile.keys.start for key in self._range)
        width = tile.p.shape[-1]
        if low == high and 0 <= low < width:
            self.parts.append(tile.p[..., low].clone())
        elif low < width and high >= 0:
            index = self.key[tile.rows] - tile.keys.start
            inside = (index >= 0) & (index < width)
            self.parts.append(tile.p.gather(-1, index.clamp(0, width - 1)[..., None]).squeeze(-1) * inside)

    def results(self) -> dict[str, Tensor]:
        return {"sink": self.total}


class WeightOnSet(RowSum):
    """Joint weight on given keys (`sink` with `sink_keys`)."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        keys = options.sinks(space.n_keys)
        self.member = torch.zeros(space.n_keys, dtype=space.dtype, device=space.device)
        self.member[keys] = 1

    def add(self, tile: Tile) -> None:
        self.parts.append(tile.p @ self.member[tile.keys])

    def results(self) -> dict[str, Tensor]:
        return {"sink": self.total}


class Induction(RowSum):
    """Weight on keys that follow an earlier copy of the query's token."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.ids = options.ids(space.n_batch, space.n_queries, space.n_keys, space.offset).to(space.device)

    def add(self, tile: Tile) -> None:
        if tile.keys.start > tile.queries.stop - 1 + tile.offset:
            return
        copies = previous_copies(self.ids[tile.batch], tile.queries, tile.keys, tile.offset)
        self.parts.append(tile.product(copies[:, None]).sum(-1))

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
        p = pad(tile.p, (0, -n % size, 0, -m % size)) if n % size or m % size else tile.p
        blocks = p.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
        q0, k0 = tile.queries.start // size, tile.keys.start // size
        at = (tile.batch, tile.heads, slice(q0, q0 + blocks.shape[2]), slice(k0, k0 + blocks.shape[4]))
        self.sum[at] += blocks.sum((-1, -3))
        self.max[at] = torch.maximum(self.max[at], blocks.amax((-1, -3)))

    def results(self) -> dict[str, Tensor]:
        return {"pooled_sum": self.sum, "pooled_max": self.max}


def build(names: list[str], space: Space, options: Options, width: int) -> list[Accumulator]:
    """The accumulators that produce these statistics, of tiles of at most `width` keys; those that need log p first."""
    wanted: dict[str, Callable[[], Accumulator]] = {}
    for name in names:
        if name == "entropy":
            wanted[name] = lambda: Entropy(space, options)
        elif name == "effective_keys":
            wanted[name] = lambda: EffectiveKeys(space, options)
        elif name in ("peak", "peak_key"):
            wanted["peak"] = lambda: Peak(space, options, width)
        elif name in ("distance", "distance_var"):
            wanted["distance"] = lambda: Distance(space, options)
        elif name == "sink" and options.sink_keys is not None:
            wanted[name] = lambda: WeightOnSet(space, options)
        elif name == "sink":
            wanted[name] = lambda: OnFirstKey(space, options)
        elif name == "current":
            wanted[name] = lambda: OnDiagonal(space, options, "current", 0)
        elif name == "previous":
            wanted[name] = lambda: OnDiagonal(space, options, "previous", 1)
        elif name == "induction":
            wanted[name] = lambda: Induction(space, options)
        elif name in ("received", "received_mean"):
            wanted["received"] = lambda: Received(space, options)
        elif name == "top_keys":
            wanted[name] = lambda: TopKeys(space, options)
        elif name in ("pooled_mean", "pooled_max"):
            wanted["pooled"] = lambda: Pooled(space, options)
    return sorted((make() for make in wanted.values()), key=lambda a: not a.wants_log)
