"""`induction`: the weight on keys that follow an earlier copy of the query's token."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.statistics.accumulator import RowSum
from workbench.kernels.statistics.existing import Rows
from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.record import Statistic, register
from workbench.kernels.statistics.whole_rows import WholeRows
from workbench.kernels.tile import Space, Tile


def previous_copies(ids: Tensor, queries: slice, keys: slice, offset: int = 0) -> Tensor:
    """[batch, q, k] bool: key j follows an earlier copy of query i's token (token[j−1] = token[i], j−1 < i).

    Args:
        ids: [batch, 1 + key], as `Options.ids` gives them.
        offset: absolute position of query row 0.

    >>> previous_copies(torch.tensor([[-1, 7, 8, 7]]), slice(2, 3), slice(0, 3)).tolist()
    [[[False, True, False]]]
    """
    i = torch.arange(queries.start, queries.stop, device=ids.device)[:, None] + offset
    j = torch.arange(keys.start, keys.stop, device=ids.device)[None, :]
    return (ids[:, 1 + i] == ids[:, None, keys]) & (j <= i)


class Induction(RowSum):
    """Weight on keys that follow an earlier copy of the query's token."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.ids = options.ids(space.n_batch, space.n_queries, space.n_keys, space.offset).to(space.device)

    def add(self, tile: Tile) -> None:
        if tile.keys.start > tile.queries.stop - 1 + tile.offset:
            return
        copies = previous_copies(self.ids[tile.batch], tile.queries, tile.keys, tile.offset)
        self.of_tiles.append(tile.product(copies[:, None]).sum(-1))

    def results(self) -> dict[str, Tensor]:
        return {"induction": self.total}


def _define(rows: WholeRows) -> Tensor:
    n_batch, _, n_queries, n_keys = rows.p.shape
    ids = rows.options.ids(n_batch, n_queries, n_keys, rows.offset)
    copies = previous_copies(ids, slice(0, n_queries), slice(0, n_keys), rows.offset)
    return (rows.p * copies[:, None]).sum(-1)


def _follows_a_copy(rows: Rows, options: Options) -> Tensor:
    """[batch, head or 1, query]: whether a key that the query sees follows an earlier copy of its token."""
    n_batch, _, n_queries, n_keys = rows.shape
    ids = options.ids(n_batch, n_queries, n_keys, rows.mask.offset).to(rows.device)
    if not rows.by_rules:
        return rows.that_see(lambda queries: previous_copies(ids, queries, slice(0, n_keys), rows.mask.offset))
    # The nearest copy is the one that a window hides last. Equal ids stand together, in order, in a stable sorting.
    order = ids.argsort(dim=1, stable=True)
    found = ids.gather(1, order)
    same = torch.nn.functional.pad(found[:, 1:] == found[:, :-1], (1, 0))
    before = torch.where(same, torch.nn.functional.pad(order[:, :-1], (1, 0)), -1)
    nearest = torch.empty_like(order).scatter_(1, order, before)
    return rows.reach(nearest[:, 1 + rows.i])[:, None]


INDUCTION = register(
    Statistic(
        "induction",
        "query",
        "mass",
        "weight on keys that follow an earlier copy of the token, where one is seen",
        _define,
        formula=r"\sum_{j \le i,\; t_{j-1} = t_i} p_{ij}",
        range=(0, 1),
        positional=True,
        collect=Induction,
        exists=_follows_a_copy,
        merge=lambda shards: shards.existing("induction"),
    )
)
