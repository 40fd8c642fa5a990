"""What neighborhood attention can save: tiles visited, the bound in operations, and the end-to-end speed-up.

After the simulator that arXiv 2504.16922 describes. Every count is a product over the dimensions, so that even video
shapes take no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.neighborhood.axis import Axis
from workbench.kernels.neighborhood.layout import NeighborhoodLayout

Tiling = Literal["static", "dynamic"]


def visited_tiles(
    layout: NeighborhoodLayout, query_tile: Sequence[int], key_tile: Sequence[int], tiling: Tiling = "static"
) -> tuple[int, int]:
    """Key tiles visited by all query tiles, and how many there are to visit in dense attention, padding included.

    Args:
        query_tile, key_tile: tokens in each dimension.
        tiling: "static" key tiles lie on a fixed grid, as in the kernels that are modelled; "dynamic" ones start where
            the window of the query tile starts.

    >>> visited_tiles(NeighborhoodLayout((16,), 8, 8), (4,), (4,))
    (8, 16)
    """
    _check(layout, query_tile, key_tile, tiling)
    visited, every = 1, 1
    for axis, rows, columns in zip(layout.axes, query_tile, key_tile, strict=True):
        visited *= int(_visited(axis, rows, columns, tiling)[1].sum())
        every *= -(-axis.length // rows) * -(-axis.length // columns)
    return visited, every


def simulated_speedup(
    layout: NeighborhoodLayout, query_tile: Sequence[int], key_tile: Sequence[int], tiling: Tiling = "static"
) -> float:
    """Pairs of query tile and key in dense attention, over those in visited tiles.

    Of tiles at the far edge, what lies inside counts: padding is work to neither. So it is never above `flop_bound`.

    >>> layout = NeighborhoodLayout((44,), 32, 8)
    >>> simulated_speedup(layout, (8,), (8,), "dynamic") <= flop_bound(layout)
    True
    """
    _check(layout, query_tile, key_tile, tiling)
    dense, visited = 1, 1
    for axis, rows, columns in zip(layout.axes, query_tile, key_tile, strict=True):
        low, count = _visited(axis, rows, columns, tiling)
        first = axis.tiles(rows)[:, 0]
        in_class = axis.length // axis.dilation + (first % axis.dilation < axis.length % axis.dilation).long()
        visited *= int((torch.minimum(low + count * columns, in_class) - low).sum())
        dense *= len(low) * axis.length
    return dense / visited


def _visited(axis: Axis, rows: int, columns: int, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """For each tile of queries, where in its class the first visited key tile starts, and how many are visited."""
    low, high = axis.spans(rows)
    start = low // columns * columns if tiling == "static" else low
    return start, (high - start) // columns + 1


def flop_bound(layout: NeighborhoodLayout) -> float:
    """All pairs of tokens over those that see each other: the speed-up if nothing were computed beyond the windows.

    Without causal dimensions, whose windows are cut at the start, it is n_total / prod(window).

    >>> round(flop_bound(NeighborhoodLayout((30, 48, 80), (18, 24, 24))), 1)  # HunyuanVideo
    11.1
    """
    pairs = 1
    for axis in layout.axes:
        low, high = axis.bounds(torch.arange(axis.length))
        pairs *= int((high - low + 1).sum())
    return layout.n_tokens**2 / pairs


def perfectly_block_sparse(layout: NeighborhoodLayout, query_tile: Sequence[int], key_tile: Sequence[int]) -> bool:
    """Whether no visited tile needs a mask, with dynamic tiling: the queries of a tile share one window of whole tiles.

    So it is in a dimension if the key tile divides the window and the query tile divides the stride, or if the window
    is the whole dimension. In a causal dimension the windows end at different keys, which is never perfect with more
    than one query to a tile.

    >>> perfectly_block_sparse(NeighborhoodLayout((64, 64), 16, 8), (8, 8), (8, 16))
    True
    """
    _check(layout, query_tile, key_tile)
    for axis, rows, columns in zip(layout.axes, query_tile, key_tile, strict=True):
        tiles = axis.tiles(rows)
        low, high = axis.bounds(tiles.clamp(min=0))
        first = slice(0, 1)
        alike = ((low == low[:, first]) & (high == high[:, first])) | (tiles < 0)
        whole = (high[:, 0] - low[:, 0] + 1) % columns == 0
        everything = axis.window == axis.length and not axis.causal
        if not everything and not bool(alike.all() and whole.all()):
            return False
    return True


def end_to_end(speedup: float, share: float, dense_steps: int = 0, steps: int = 1) -> float:
    """Speed-up of a whole model by Amdahl's law.

    Args:
        speedup: of attention, where it is sparse.
        share: of attention in the time of the dense model, from 0 to 1.
        dense_steps, steps: of a diffusion model; the first so many keep dense attention.

    >>> round(end_to_end(115200 / 10368, 0.607), 2), round(end_to_end(115200 / 10368, 0.607, 15, 50), 2)
    (2.23, 1.63)
    """
    if not 0 <= share <= 1:
        raise CaptureError(f"share={share} is not from 0 to 1")
    if speedup <= 0:
        raise CaptureError(f"speedup={speedup} is not above 0")
    if steps < 1 or not 0 <= dense_steps <= steps:
        raise CaptureError(f"dense_steps={dense_steps} is not one of 0 to steps={steps}")
    dense = dense_steps / steps
    return 1 / (1 - share + share * (dense + (1 - dense) / speedup))


def _check(
    layout: NeighborhoodLayout, query_tile: Sequence[int], key_tile: Sequence[int], tiling: Tiling = "static"
) -> None:
    if tiling not in ("static", "dynamic"):
        raise CaptureError(f'tiling is "static" or "dynamic", not {tiling!r}')
    for name, tile in (("query_tile", query_tile), ("key_tile", key_tile)):
        if len(tile) != len(layout.shape) or min(tile) < 1:
            raise CaptureError(f"{name}={list(tile)} does not fit the shape {list(layout.shape)}")
