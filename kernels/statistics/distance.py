"""`distance` and `distance_var`: how far a row looks, and how much that varies within it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workbench.kernels.statistics.accumulator import Accumulator
from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.record import Statistic, register
from workbench.kernels.statistics.shards import Shards
from workbench.kernels.statistics.whole_rows import WholeRows
from workbench.kernels.tile import Online, Rows, Space, Tile

_BAND = 64  # keys


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
        behind = tile.keys.stop - 1 <= low or self.space.mask.causal  # keys after the query weigh nothing there
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


def _moments(rows: WholeRows) -> tuple[Tensor, Tensor]:
    away = (rows.i - rows.j).abs().double()
    mass = rows.p.sum(-1)
    mean = (rows.p * away).sum(-1) / mass
    return mean, (rows.p * (away - mean[..., None]).square()).sum(-1) / mass


def _merge_variance(shards: Shards) -> Tensor:
    """Within shards, and between their means."""
    mean = shards.of("distance")
    spread = (mean - shards.mean(mean)).square()
    return shards.alive(shards.mean(shards.of("distance_var") + spread))


DISTANCE = register(
    Statistic(
        "distance",
        "query",
        "tokens",
        "mean of |i−j|",
        lambda rows: _moments(rows)[0],
        formula=r"d_i = \sum_j p_{ij}\,\lvert i-j \rvert \big/ \sum_j p_{ij}",
        range=(0, math.inf),
        positional=True,
        collect=Distance,
        merge=lambda shards: shards.alive(shards.mean(shards.of("distance"))),
    )
)
DISTANCE_VAR = register(
    Statistic(
        "distance_var",
        "query",
        "tokens²",
        "variance of |i−j|",
        lambda rows: _moments(rows)[1],
        formula=r"\sum_j p_{ij}\,(\lvert i-j \rvert - d_i)^2 \big/ \sum_j p_{ij}",
        range=(0, math.inf),
        positional=True,
        collect=Distance,
        finish=lambda raw, space, options: raw["distance_var"].clamp(min=0),  # below zero by rounding alone
        merge=_merge_variance,
        merges_with=("distance",),
    )
)
