"""Where the tiles that a processor made lie on the picture that it was given: asked of the processor itself.

It is given a picture of the same size whose red grows to the right and whose green grows downwards, both from 0 to 255,
and whose blue is full. In what it makes of that, colours tell where each pixel came from, whatever was resized,
cropped, padded or cut into tiles on the way; where blue is not full it came from nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.analysis.grounding.tiles import Box
from workbench.errors import WorkbenchError

_FULL = 250  # of 255: blue that no padding has touched
_BENT = 3.0  # levels of 255 by which colours may miss a straight line: rounding twice, and the filter's overshoot
_SNAP = 0.75  # processed pixels: an edge that is so near to the picture's border is the border


def compass(size: Sequence[int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[row, column, 3] the picture that tells where its pixels are.

    >>> compass((2, 3))[0, 2].tolist()
    [212, 64, 255]
    """
    height, width = size
    x = np.round(255 * (np.arange(width) + 0.5) / width)
    y = np.round(255 * (np.arange(height) + 0.5) / height)
    made = np.full((height, width, 3), 255, dtype=np.uint8)
    made[..., 0], made[..., 1] = x[None], y[:, None]
    return made


def processed(processor: Any, size: Sequence[int], settings: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What a processor makes of the compass: its tiles [tile, 3, row, column], or patches [patch, …] and their grid.

    Raises:
        WorkbenchError: it does not take images as those of transformers do.
    """
    from PIL import Image

    images = getattr(processor, "image_processor", processor)
    try:
        made = images(Image.fromarray(compass(size)), return_tensors="pt", do_rescale=False, do_normalize=False,
                      **settings)  # fmt: skip
        pixels = made["pixel_values"]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise WorkbenchError(
            f"the processor does not tell how it treats a picture of {size[0]} x {size[1]}: {error}",
            hint="give processor= as it made the inputs, an image processor of transformers",
        ) from None
    pixels = torch.as_tensor(np.asarray(pixels)) if not isinstance(pixels, Tensor) else pixels
    grid = made.get("image_grid_thw")
    if grid is not None:
        return pixels.double(), torch.as_tensor(np.asarray(grid))
    if pixels.dim() < 4 or pixels.shape[-3] != 3:
        raise WorkbenchError("the processor makes no tiles [tile, 3, row, column]", shape=pixels.shape)
    return pixels.double().flatten(0, -4), None


def box_of(tile: Tensor, size: Sequence[int]) -> Box | None:
    """What a processed tile [3, row, column] of the compass covers; None where nothing of the picture is in it.

    Raises:
        WorkbenchError: its pixels do not lie on the picture row by row and column by column.
    """
    inside = tile[2] >= _FULL
    if not bool(inside.any()):
        return None
    x0, x1 = _line(tile[0], inside, size[1])
    y0, y1 = _line(tile[1].T, inside.T, size[0])
    return x0, y0, x1, y1


def _line(level: Tensor, inside: Tensor, length: int) -> tuple[float, float]:
    """Where the first and last column of a tile begin and end on the picture, along one edge of `length` pixels."""
    columns = inside.any(0).nonzero()[:, 0]
    values = torch.stack([level[:, c][inside[:, c]].median() for c in columns.tolist()])
    at = columns.double() + 0.5
    if length < 2 or len(at) < 2:
        raise WorkbenchError(f"where a tile lies cannot be told along an edge of {length} pixels")
    where = values * length / 255
    slope, start = _fit(at, where)
    # Near the picture's borders a filter has nothing beyond to weigh against, and levels stand still.
    clear = (where > 2.5) & (where < length - 2.5) & (columns > columns[0] + 1) & (columns < columns[-1] - 1)
    if int(clear.sum()) >= 4:
        slope, start = _fit(at[clear], where[clear])
        off = (where[clear] - slope * at[clear] - start).abs().max() * 255 / length
        if float(off) > _BENT:
            raise WorkbenchError("the processor bends pictures: their pixels do not stay in rows and columns")
    if slope <= 0:
        raise WorkbenchError("the processor turns pictures round, or a tile shows too little to tell where it lies")
    low, high = start, start + slope * level.shape[1]
    low = 0.0 if abs(low) < _SNAP * slope else low
    high = float(length) if abs(high - length) < _SNAP * slope else high
    return low, high


def _fit(at: Tensor, where: Tensor) -> tuple[float, float]:
    """Slope and start of a line through points."""
    middle = at.mean()
    slope = ((at - middle) * (where - where.mean())).sum() / ((at - middle) ** 2).sum()
    return float(slope), float(where.mean() - slope * middle)


def check_flattened(patches: Tensor, grid: Tensor, merge: int, size: Sequence[int]) -> None:
    """Raise a WorkbenchError where patches of the compass do not lie on their grid, group after group.

    Args:
        patches: [patch, channel · frames · row · column]. grid: (1, rows, columns).
    """
    rows, columns = (int(n) for n in grid[0, 1:])
    levels = patches.unflatten(1, (3, -1)).mean(-1) / 255  # [patch, channel]
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    in_order = torch.stack([(x + 0.5) / columns, (y + 0.5) / rows], -1)
    groups = in_order.unflatten(0, (-1, merge)).unflatten(2, (-1, merge)).transpose(1, 2).reshape(-1, 2)
    # A patch may miss its place by rounding, and by what the filter does at the border; the next one is farther off.
    allowed = 0.5 * torch.tensor([1 / columns, 1 / rows])
    if bool(((levels[:, :2] - groups).abs() > allowed).any()) or bool((levels[:, 2] < _FULL / 255).any()):
        raise WorkbenchError(
            f"the patches of a picture of {size[0]} x {size[1]} do not lie on the processor's grid",
            hint="it crops, pads or orders patches in a way that grounding does not know",
        )
