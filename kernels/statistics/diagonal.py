"""`current` and `previous`: the weight on a query's own position, and on the one before."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.functional import pad

from workbench.kernels.statistics.accumulator import RowSum
from workbench.kernels.statistics.existing import Rows
from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.record import Statistic, register
from workbench.kernels.tile import Space, Tile


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
            self.of_tiles.append(pad(weight, (first, n_queries - first - weight.shape[-1])))

    def results(self) -> dict[str, Tensor]:
        return {self.name: self.total}


def _sees_the_one_before(rows: Rows, options: Options) -> Tensor:
    if rows.by_rules:
        return rows.reach(rows.i - 1)
    return rows.once("see the one before", lambda: rows.that_see(lambda at: (rows.i[at, None] - 1 == rows.j)[None]))


CURRENT = register(
    Statistic(
        "current",
        "query",
        "mass",
        "weight on the query's own position",
        lambda rows: (rows.p * (rows.i == rows.j)).sum(-1),
        formula=r"p_{ii}",
        range=(0, 1),
        positional=True,
        collect=partial(OnDiagonal, name="current", back=0),
        merge=lambda shards: shards.alive(shards.mean(shards.of("current"))),
    )
)
PREVIOUS = register(
    Statistic(
        "previous",
        "query",
        "mass",
        "weight on the position before, where it is seen",
        lambda rows: (rows.p * (rows.i - 1 == rows.j)).sum(-1),
        formula=r"p_{i,\,i-1}",
        range=(0, 1),
        positional=True,
        collect=partial(OnDiagonal, name="previous", back=1),
        exists=_sees_the_one_before,
        merge=lambda shards: shards.existing("previous"),
    )
)
