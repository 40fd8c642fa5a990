"""`pooled_mean` and `pooled_max`: a map made small, block by block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.kernels.statistics.accumulator import Accumulator
from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.record import Raw, Statistic, register
from workbench.kernels.statistics.whole_rows import WholeRows
from workbench.kernels.tile import Space, Tile


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


def _blocks(rows: WholeRows) -> Tensor:
    """[b, h, Q, size, K, size] with zero padding at the far edges."""
    size = rows.options.block
    n_queries, n_keys = rows.p.shape[-2:]
    padded = pad(rows.p, (0, -n_keys % size, 0, -n_queries % size))
    return padded.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))


def _averaged(sums: Tensor, n_queries: int, block: int) -> Tensor:
    """Sums over blocks of queries, of which the last may be shorter, as means over their queries."""
    sizes = torch.full((sums.shape[-2],), block, device=sums.device)
    sizes[-1] = n_queries - block * (len(sizes) - 1)
    return sums / sizes[:, None]


def _mean(raw: Raw, space: Space, options: Options) -> Tensor:
    return _averaged(raw["pooled_sum"], space.n_queries, options.block)


POOLED_MEAN = register(
    Statistic(
        "pooled_mean",
        "block",
        "mass",
        "mass on a block of keys, averaged over a block of queries",
        lambda rows: _averaged(_blocks(rows).sum((-1, -3)), rows.n_queries, rows.options.block),
        formula=r"\frac{1}{\lvert I \rvert} \sum_{i \in I} \sum_{j \in J} p_{ij}",
        range=(0, 1),
        collect=Pooled,
        finish=_mean,
    )
)
POOLED_MAX = register(
    Statistic(
        "pooled_max",
        "block",
        "mass",
        "largest weight in a block",
        lambda rows: _blocks(rows).amax((-1, -3)),
        formula=r"\max_{i \in I,\, j \in J} p_{ij}",
        range=(0, 1),
        collect=Pooled,
        finish=lambda raw, space, options: space.without_floor(raw["pooled_max"]),
    )
)
