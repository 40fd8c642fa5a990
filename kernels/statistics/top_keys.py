"""`top_keys`: the n largest weights of a row and their keys, exact."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.statistics.accumulator import Accumulator
from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.record import Raw, Statistic, register
from workbench.kernels.statistics.shards import Shards
from workbench.kernels.statistics.whole_rows import WholeRows
from workbench.kernels.tile import Online, Rows, Space, Tile

_INDEX, _WEIGHT = "top_keys_index", "top_keys_weight"


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


def _define(rows: WholeRows) -> dict[str, Tensor]:
    weight, index = rows.p.topk(min(rows.options.n_top, rows.p.shape[-1]), dim=-1)
    return {_INDEX: torch.where(weight > 0, index, -1), _WEIGHT: weight}


def _finish(raw: Raw, space: Space, options: Options) -> dict[str, Tensor]:
    """Slots that no visible key fills have key −1 and no weight."""
    alive = (space.seen.keys_per_query > 0)[..., None]
    weight = torch.where(alive, space.without_floor(raw[_WEIGHT]), 0.0)
    return {_INDEX: torch.where(weight > 0, raw[_INDEX], -1), _WEIGHT: weight}


def _merge(shards: Shards) -> dict[str, Tensor]:
    """The largest of all shards."""
    weights, keys = shards.each(_WEIGHT), shards.each(_INDEX)
    n = max(weight.shape[-1] for weight in weights)
    scaled = torch.cat([w.double() * share[..., None] for w, share in zip(weights, shards.weight, strict=True)], -1)
    index = torch.cat([torch.where(i < 0, i, i + start) for i, start in zip(keys, shards.starts, strict=True)], -1)
    best, order = scaled.topk(n, dim=-1)
    return {_INDEX: torch.where(best > 0, index.gather(-1, order), -1), _WEIGHT: best}


TOP_KEYS = register(
    Statistic(
        "top_keys",
        "query top",
        "mass",
        "the n largest weights of a row and their keys",
        _define,
        formula=r"\operatorname{top}_n \{(j, p_{ij})\}",
        range=(0, 1),
        outputs=(_INDEX, _WEIGHT),
        collect=TopKeys,
        finish=_finish,
        merge=_merge,
    )
)
