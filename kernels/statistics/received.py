"""`received` and `received_mean`: how much weight a key gets from all queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workbench.kernels.statistics.accumulator import Accumulator
from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.record import Raw, Statistic, register
from workbench.kernels.tile import Space, Tile


class Received(Accumulator):
    """Σ over queries of the weight on each key."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.total = torch.zeros(space.n_batch, space.n_heads, space.n_keys, dtype=space.dtype, device=space.device)

    def add(self, tile: Tile) -> None:
        self.total[tile.batch, tile.heads, tile.keys].add_(tile.p.sum(-2))

    def results(self) -> dict[str, Tensor]:
        return {"received": self.total}


def _mean(raw: Raw, space: Space, options: Options) -> Tensor:
    queries = space.seen.queries_per_key
    return torch.where(queries > 0, raw["received"] / queries, torch.nan)


RECEIVED = register(
    Statistic(
        "received",
        "key",
        "mass",
        "Σ over queries of the weight on a key",
        lambda rows: rows.p.sum(-2),
        formula=r"\sum_i p_{ij}",
        range=(0, math.inf),
        collect=Received,
    )
)
RECEIVED_MEAN = register(
    Statistic(
        "received_mean",
        "key",
        "mass",
        "received, divided by the number of queries that see the key",
        lambda rows: rows.p.sum(-2) / rows.seen.sum(-2),
        formula=r"\sum_i p_{ij} \big/ \lvert \{i : i \text{ sees } j\} \rvert",
        range=(0, 1),
        collect=Received,
        finish=_mean,
    )
)
