"""`peak` and `peak_key`: the largest weight of a row, and where it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.statistics.accumulator import Accumulator
from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.record import Statistic, register
from workbench.kernels.statistics.shards import Shards
from workbench.kernels.tile import Online, Rows, Space, Tile


class Peak(Accumulator):
    """Largest weight of a row and its key; the first of equal ones.

    Per tile only the largest weight of each row is found, and, place by place, the larger of the tile's weights and
    those of the tiles before it. The first says in which tile the row's largest weight lies, the second at which place
    of a tile. A product finds that place in a third of the time of an argmax: how many places hold the weight, and
    their sum. Only rows in which several do need an argmax, of a tile made again.
    """

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.best = space.per_query(-1.0)
        self.key = space.per_query(-1, torch.long)
        self._places = torch.empty(2, 0, dtype=space.dtype, device=space.device)
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
        count, place = (self._places_of(here.shape[-1]) @ here.mT).unbind(-2)
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

    def _places_of(self, width: int) -> Tensor:
        """[2, width]: ones, and places from 0 on."""
        if self._places.shape[1] < width:
            place = torch.arange(width, dtype=self.space.dtype, device=self.space.device)
            self._places = torch.stack((torch.ones_like(place), place))
        return self._places[:, :width]

    def rescale(self, rows: Rows, online: Online) -> None:
        """The key stays; -1, which stands for none yet, shrinks and is still less than any weight."""
        self.best[rows] *= online.factor

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """A weight."""
        self.best /= denominator

    def results(self) -> dict[str, Tensor]:
        return {"peak": self.best, "peak_key": self.key}


def _merge_key(shards: Shards) -> Tensor:
    best = (shards.weight * shards.of("peak")).argmax(0, keepdim=True)
    keys = torch.stack([key + start for key, start in zip(shards.each("peak_key"), shards.starts, strict=True)])
    return shards.alive(keys.gather(0, best)[0], -1)


PEAK = register(
    Statistic(
        "peak",
        "query",
        "mass",
        "largest weight",
        lambda rows: rows.p.amax(-1),
        formula=r"\max_j p_{ij}",
        range=(0, 1),
        collect=Peak,
        merge=lambda shards: shards.alive((shards.weight * shards.of("peak")).amax(0)),
    )
)
PEAK_KEY = register(
    Statistic(
        "peak_key",
        "query",
        "position",
        "key of the largest weight",
        lambda rows: rows.p.argmax(-1),
        formula=r"\arg\max_j p_{ij}",
        range=(-1, float("inf")),
        empty=-1,
        collect=Peak,
        merge=_merge_key,
        merges_with=("peak",),
    )
)
