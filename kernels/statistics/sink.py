"""`sink`: the weight on the first key that a row sees, or on given keys."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.statistics.accumulator import Accumulator, RowSum
from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.record import Statistic, register
from workbench.kernels.statistics.shards import Shards
from workbench.kernels.statistics.whole_rows import WholeRows
from workbench.kernels.tile import Rows, Space, Tile


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
            self.of_tiles.append(tile.p[..., low].clone())
        elif low < width and high >= 0:
            index = self.key[tile.rows] - tile.keys.start
            inside = (index >= 0) & (index < width)
            self.of_tiles.append(tile.p.gather(-1, index.clamp(0, width - 1)[..., None]).squeeze(-1) * inside)

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
        self.of_tiles.append(tile.p @ self.member[tile.keys])

    def results(self) -> dict[str, Tensor]:
        return {"sink": self.total}


def _collect(space: Space, options: Options) -> Accumulator:
    return OnFirstKey(space, options) if options.sink_keys is None else WeightOnSet(space, options)


def _define(rows: WholeRows) -> Tensor:
    if rows.options.sink_keys is not None:
        return rows.p[..., list(rows.options.sink_keys)].sum(-1)
    return rows.p.gather(-1, rows.seen.to(torch.uint8).argmax(-1, keepdim=True)).squeeze(-1)


def _merge(shards: Shards) -> Tensor:
    """The weight on the first visible key, which lies in the first shard that a row sees."""
    alive = shards.lse > -torch.inf
    first = alive & (alive.cumsum(0) == 1)
    return shards.alive(shards.mean(shards.of("sink") * first))


SINK = register(
    Statistic(
        "sink",
        "query",
        "mass",
        "weight on the first visible key, or on a given set of keys",
        _define,
        formula=r"\sum_{j \in S} p_{ij}",
        range=(0, 1),
        collect=_collect,
        merge=_merge,
    )
)
