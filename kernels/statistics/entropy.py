"""`entropy`: how spread out a row is, in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workbench.kernels.statistics.accumulator import RowSum
from workbench.kernels.statistics.record import Statistic, register
from workbench.kernels.statistics.shards import Shards
from workbench.kernels.tile import Online, Rows, Tile


class Entropy(RowSum):
    """−Σ p ln p; overwrites the tile's log_p."""

    wants_log = True

    def add(self, tile: Tile) -> None:
        assert tile.log_p is not None
        self.of_tiles.append(tile.log_p.mul_(tile.p).sum(-1))

    def close(self, rows: Rows) -> None:
        """What the tiles gave are bits, and negative."""
        if self.of_tiles:
            self.total[rows].sub_(torch.stack(self.of_tiles).sum(0), alpha=math.log(2))
            self.of_tiles.clear()

    def rescale(self, rows: Rows, online: Online) -> None:
        """Every ln p moves by the shift too."""
        self.total[rows] = (self.total[rows] - online.shift * online.mass) * online.factor

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Every ln p loses the logarithm of the denominator."""
        self.total = (self.total + denominator.log() * mass) / denominator

    def results(self) -> dict[str, Tensor]:
        return {"entropy": self.total.clamp(min=0)}  # below zero by rounding alone


def _merge(shards: Shards) -> Tensor:
    """The entropy of the parts, and of the choice between them."""
    between = torch.xlogy(shards.weight, shards.weight).sum(0)
    return shards.alive(shards.mean(shards.of("entropy")) - between)


ENTROPY = register(
    Statistic(
        "entropy",
        "query",
        "nats",
        "−Σ p ln p",
        lambda rows: -torch.xlogy(rows.p, rows.p).sum(-1),
        formula=r"-\sum_j p_{ij} \ln p_{ij}",
        range=(0, math.inf),
        collect=Entropy,
        merge=_merge,
    )
)
