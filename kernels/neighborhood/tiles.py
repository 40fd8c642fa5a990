"""The tiles that neighborhood attention runs in on the CPU: a small box of queries with the box of keys it needs."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from workbench.kernels.blocked import Group, Plan
from workbench.kernels.neighborhood.axis import Axis
from workbench.kernels.neighborhood.layout import NeighborhoodLayout, flat_tiles

_MOST_QUERIES = 128
_GATHER = 32  # what it costs to gather a key and its value, in queries multiplied with them


@lru_cache(maxsize=16)
def plan(layout: NeighborhoodLayout, tile: tuple[int, ...] | None = None) -> Plan:
    """The tiles of a row-major layout, all of one size; their masks are made when they are used.

    Args:
        tile: queries of a tile in each dimension; None for `best_tile`.
    """
    tile = best_tile(layout) if tile is None else tile
    n, axes = layout.n_tokens, layout.axes
    rows = [axis.tiles(size) for axis, size in zip(axes, tile, strict=True)]
    boxes = [axis.boxes(size) for axis, size in zip(axes, tile, strict=True)]
    sees = [_sees(axis, x, y) for axis, x, y in zip(axes, rows, boxes, strict=True)]
    queries, keys = flat_tiles(rows, layout.shape), flat_tiles(boxes, layout.shape)
    extra = torch.arange(n, layout.n_keys).expand(len(keys), -1)
    # One more token stands for all padding.
    keys = torch.cat([keys.where(keys >= 0, layout.n_keys), extra], dim=1)
    tiles = tuple(len(part) for part in rows)

    def mask(part: slice) -> Tensor:
        at = torch.unravel_index(torch.arange(part.start, part.stop), tiles)
        found = torch.ones(len(at[0]), 1, 1, dtype=torch.bool)
        for each, where in zip(sees, at, strict=True):
            here = each[where]
            found = (found[:, :, None, :, None] & here[:, None, :, None, :]).flatten(1, 2).flatten(2)
        return torch.nn.functional.pad(found, (0, layout.extra_keys), value=True)

    full = all(bool(each.all()) for each in sees)
    group = Group(
        torch.zeros(len(keys), dtype=torch.long), queries.where(queries >= 0, n), keys, None if full else mask
    )
    return Plan(1, 1, n + int(queries.min() < 0), layout.n_keys + int(keys.max() == layout.n_keys), (group,))


def _sees(axis: Axis, x: Tensor, y: Tensor) -> Tensor:
    """[tile, query, key] bool; padding neither sees nor is seen."""
    real = (x >= 0)[:, :, None] & (y >= 0)[:, None]
    return axis.sees(x.clamp(min=0)[:, :, None], y.clamp(min=0)[:, None]) & real


def best_tile(layout: NeighborhoodLayout) -> tuple[int, ...]:
    """Queries of a tile in each dimension: the least work in products and gathered keys, up to 128 queries a tile.

    >>> best_tile(NeighborhoodLayout((64, 64), 16, 16))
    (8, 16)
    """
    sizes = []
    for axis in layout.axes:
        longest = -(-axis.length // axis.dilation)
        wanted = {1, 2, 4, 8, 16, 32, 64, 128, axis.stride, 2 * axis.stride, axis.stride // 2, longest}
        sizes.append(
            [(s, len(axis.tiles(s)), axis.boxes(s).shape[1]) for s in sorted(wanted) if 1 <= s <= min(longest, 128)]
        )
    best: tuple[float, tuple[int, ...]] | None = None
    for choice in itertools.product(*sizes):
        rows, tiles, keys = (_product(each) for each in zip(*choice, strict=True))
        if rows > _MOST_QUERIES:
            continue
        work = tiles * (keys + layout.extra_keys) * (rows + _GATHER)
        if best is None or work < best[0]:
            best = work, tuple(size for size, _, _ in choice)
    assert best is not None  # a tile of one query is always there
    return best[1]


def _product(numbers: tuple[int, ...]) -> int:
    found = 1
    for number in numbers:
        found *= number
    return found
