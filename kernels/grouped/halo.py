"""Blocked local attention with a halo: the pixels of a block share a window that reaches beyond it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_range
from workbench.kernels.functions import attention_function
from workbench.kernels.grouped.attention import check_sequence, group_weights
from workbench.kernels.grouped.pattern import GroupedPattern, apply_groups


@lru_cache(maxsize=16)
def halo_groups(grid: tuple[int, int], block: int, halo: int) -> tuple[Tensor, Tensor]:
    """The queries [block², block] and the keys of the windows, by row-major number: [group, block²], [group, window²].

    −1 stands for what lies outside of the grid.

    Raises:
        CaptureError: the blocks do not divide the grid, or a number out of range.

    >>> rows, columns = halo_groups((2, 2), block=1, halo=1)
    >>> rows[3].tolist(), columns[3].tolist()
    ([3], [0, 1, -1, 2, 3, -1, -1, -1, -1])
    """
    height, width = grid
    check_range("block", block, 1, min(grid))
    check_range("halo", halo, 0, max(grid))
    if height % block or width % block:
        raise CaptureError(
            f"blocks of {block} do not divide a grid of {height} × {width}",
            hint=f"take a block that divides both, at most {min(grid)}",
        )

    def square(first: int, size: int) -> Tensor:
        tops, lefts = torch.meshgrid(torch.arange(0, height, block), torch.arange(0, width, block), indexing="ij")
        y, x = (t.flatten()[:, None, None] + first for t in (tops, lefts))
        y, x = y + torch.arange(size)[:, None], x + torch.arange(size)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        return (y * width + x).where(inside, -1).flatten(1)

    with torch.inference_mode(False):  # they are kept, also for calls whose gradients need them
        return square(0, block), square(-halo, block + 2 * halo)


def _pattern(
    q: Tensor,
    k: Tensor,
    *,
    grid: Sequence[int],
    block: int,
    halo: int,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    scale: float | None = None,
    scaled_positions: bool = False,
    pads: bool = False,
) -> GroupedPattern:
    check_sequence(q, k)
    rows, columns = _groups(q, grid, block, halo)
    bias = _positions(q, rows, block, halo, rel_height, rel_width, scale if scaled_positions else 1.0)
    weights = group_weights(q, k, rows, columns, scale=scale, bias=bias, pads=pads)
    return GroupedPattern(weights, rows, columns, q.shape[2], k.shape[2], normalised=not pads)


@attention_function(_pattern)
def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    block: int,
    halo: int,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    scale: float | None = None,
    scaled_positions: bool = False,
    pads: bool = False,
) -> Tensor:
    """Softmax attention of the pixels of each block over a window around it (HaloNet, arXiv 2103.12731).

    Args:
        q, k: [batch, head, height · width, d], pixels row-major; v: the same with its own width.
        grid: (height, width), which blocks divide. block: edge of the blocks. halo: pixels around them that are seen.
        rel_height, rel_width: [2 · window − 1, d] with window = block + 2 · halo: q · r[window − 1 + key − query] is
            added, of rows and of columns, where a key counts from the window's edge and a query from its block's.
        scale: factor on q kᵀ; 1/√d if None. scaled_positions: it multiplies the position terms too.
        pads: what the window sees outside of the image takes part in the softmax as zeros, and rows there sum to less
            than one; else it is hidden.

    Returns:
        [batch, head, height · width, width of v].

    Raises:
        CaptureError: tensors that do not fit the grid, blocks that do not divide it.

    >>> q = k = v = torch.ones(1, 2, 24, 8)
    >>> halo_attention(q, k, v, grid=(4, 6), block=2, halo=1).shape
    torch.Size([1, 2, 24, 8])
    """
    check_sequence(q, k, v)
    rows, columns = _groups(q, grid, block, halo)
    bias = _positions(q, rows, block, halo, rel_height, rel_width, scale if scaled_positions else 1.0)
    weights = group_weights(q, k, rows, columns, scale=scale, bias=bias, pads=pads)
    return apply_groups(weights, v.to(weights.dtype), rows, columns, q.shape[2]).to(v.dtype)


def _groups(q: Tensor, grid: Sequence[int], block: int, halo: int) -> tuple[Tensor, Tensor]:
    if len(grid) != 2 or grid[0] * grid[1] != q.shape[2]:
        raise CaptureError(f"{q.shape[2]} positions are no grid of {' × '.join(map(str, grid))}", shape=q.shape)
    rows, columns = halo_groups((grid[0], grid[1]), block, halo)
    return rows[None, None].to(q.device), columns[None, None].to(q.device)


def _positions(
    q: Tensor, rows: Tensor, block: int, halo: int, height: Tensor | None, width: Tensor | None, factor: float | None
) -> Tensor | None:
    """[batch, head, group, query, key] of the window: q·(r_y + r_x), times the factor."""
    if height is None or width is None:
        if height is not width:
            raise CaptureError("relative positions need rel_height and rel_width, both or none")
        return None
    edge = block + 2 * halo
    for name, table in (("rel_height", height), ("rel_width", width)):
        if tuple(table.shape) != (2 * edge - 1, q.shape[-1]):
            raise CaptureError(
                f"{name} must be [{2 * edge - 1}, {q.shape[-1]}] for windows of {edge}", shape=table.shape
            )
    factor = q.shape[-1] ** -0.5 if factor is None else factor
    q, height, width = (t if t.dtype == torch.float64 else t.float() for t in (q, height, width))
    each = q[:, :, rows[0, 0]].unflatten(3, (block, block))  # [batch, head, group, y, x, d]
    offset = edge - 1 + torch.arange(edge, device=q.device) - torch.arange(block, device=q.device)[:, None]
    by_row = torch.einsum("bhgyxd,ykd->bhgyxk", each, height[offset])  # k counts the rows of the window
    by_column = torch.einsum("bhgyxd,xkd->bhgyxk", each, width[offset])
    both = by_row[..., :, None] + by_column[..., None, :]
    return factor * both.flatten(5, 6).flatten(3, 4)
