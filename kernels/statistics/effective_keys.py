"""`effective_keys`: over how many keys a row would be spread if it were even (the inverse participation ratio)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workbench.kernels.statistics.accumulator import RowSum
from workbench.kernels.statistics.record import Statistic, register
from workbench.kernels.statistics.shards import Shards
from workbench.kernels.tile import Online, Rows, Tile


class EffectiveKeys(RowSum):
    """1 / Σ p²."""

    def add(self, tile: Tile) -> None:
        self.of_tiles.append(torch.linalg.vector_norm(tile.p, dim=-1))

    def close(self, rows: Rows) -> None:
        """What the tiles gave are norms."""
        if self.of_tiles:
            self.total[rows].add_(torch.stack(self.of_tiles).square_().sum(0))
            self.of_tiles.clear()

    def rescale(self, rows: Rows, online: Online) -> None:
        """Squares of weights."""
        self.total[rows] *= online.factor.square()

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Squares of weights."""
        self.total /= denominator.square()

    def results(self) -> dict[str, Tensor]:
        return {"effective_keys": 1 / self.total}


def _merge(shards: Shards) -> Tensor:
    squares = (shards.weight.square() / shards.of("effective_keys").clamp(min=1.0)).sum(0)
    return shards.alive(1 / squares)


EFFECTIVE_KEYS = register(
    Statistic(
        "effective_keys",
        "query",
        "keys",
        "1 / Σ p²",
        lambda rows: 1 / rows.p.square().sum(-1),
        formula=r"1 \big/ \sum_j p_{ij}^2",
        range=(0, math.inf),
        collect=EffectiveKeys,
        merge=_merge,
    )
)
