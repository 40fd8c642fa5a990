"""Where the pixels of pictures stand in a prompt: tiles of patches, each with its token and its box on the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels of the picture, x to the right and y down; beyond it where the processor padded it."""


@dataclass(frozen=True)
class Tile:
    """A part of a picture that the vision tower saw as a grid of patches.

    Attributes:
        picture: number of the picture.
        name: such as "image 0, tile 3" or "video 0, frames 2 to 3".
        positions: [row, column] position of each patch's token in the prompt; −1 for patches that have none.
        box: what the whole grid covers; None where no pixel of the picture is in it.
    """

    picture: int
    name: str
    positions: Tensor
    box: Box | None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, as the language model is given them."""
        return self.positions.shape[0], self.positions.shape[1]

    def boxes(self) -> Tensor:
        """[row, column, 4] the box of each patch; NaN where the tile has none.

        >>> Tile(0, "image 0", torch.arange(6).view(2, 3), (0, 0, 30, 20)).boxes()[1, 2].tolist()
        [20.0, 10.0, 30.0, 20.0]
        """
        rows, columns = self.grid
        if self.box is None:
            return torch.full((rows, columns, 4), torch.nan, dtype=torch.float64)
        x0, y0, x1, y1 = self.box
        x = torch.linspace(x0, x1, columns + 1, dtype=torch.float64)
        y = torch.linspace(y0, y1, rows + 1, dtype=torch.float64)
        top, left = torch.meshgrid(y[:-1], x[:-1], indexing="ij")
        bottom, right = torch.meshgrid(y[1:], x[1:], indexing="ij")
        return torch.stack([left, top, right, bottom], -1)


@dataclass(frozen=True)
class Picture:
    """An image, or the frames of a video that share their tokens.

    Attributes:
        name: such as "image 0" or "video 0, frame 2".
        size: height and width in pixels, of the image that was given; without one, of what the vision tower saw.
        pixels: [row, column, 3] from 0 to 255, at most 384 pixels along an edge, to be shown.
    """

    name: str
    size: tuple[int, int]
    pixels: Tensor


@dataclass(frozen=True)
class ImagePlaces:
    """Where the pictures of one prompt stand among its tokens. Made by `workbench.image_places`.

    Attributes:
        pictures, tiles: in the order of the prompt.
        others: positions of tokens that stand for pictures and for no patch of them: ends of rows, class tokens.
        length: tokens of the prompt, padding included.
        example: which row of the batch it is.
        stack: path of the module whose attentions have the prompt as their keys.
        ids: [position] the tokens. first: position of the first that is no padding.
        crossed: whether the pictures are keys of cross-attention: positions are then those of the encoder's output.
    """

    pictures: tuple[Picture, ...]
    tiles: tuple[Tile, ...]
    others: tuple[int, ...]
    length: int
    example: int = 0
    stack: str = ""
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long), repr=False)
    first: int = 0
    crossed: bool = False

    @property
    def positions(self) -> Tensor:
        """[patch] of all patches that have a token: tile by tile, row by row."""
        flat = torch.cat([tile.positions.flatten() for tile in self.tiles])
        return flat[flat >= 0]

    def tile_of(self, position: int) -> tuple[int, int, int] | None:
        """Tile, row and column of a token; None of a token that is no patch.

        >>> places = ImagePlaces((), (Tile(0, "image 0", torch.arange(6).view(2, 3) + 4, None),), (), 12)
        >>> places.tile_of(8), places.tile_of(2)
        ((0, 1, 1), None)
        """
        for number, tile in enumerate(self.tiles):
            found = (tile.positions == position).nonzero()
            if len(found):
                return number, int(found[0, 0]), int(found[0, 1])
        return None

    def __repr__(self) -> str:
        grids = ", ".join(f"{tile.name}: {tile.grid[0]} x {tile.grid[1]}" for tile in self.tiles[:6])
        more = f" and {len(self.tiles) - 6} more" if len(self.tiles) > 6 else ""
        return f"ImagePlaces({len(self.positions)} patches of {len(self.pictures)} pictures: {grids}{more})"


def raster(masses: Tensor, boxes: Tensor, size: Sequence[int], shown: Sequence[int]) -> Tensor:
    """[…, row, column] masses spread evenly over their boxes, on a picture that is drawn with `shown` pixels.

    The sum over pixels is the mass that lies on the picture: what lies in the padding around it is not on it.

    Args:
        masses: […, patch]. boxes: [patch, 4] on a picture of `size` (height, width).

    >>> raster(torch.ones(1), torch.tensor([[0.0, 0.0, 2.0, 1.0]]), (2, 2), (2, 2)).tolist()
    [[0.5, 0.5], [0.0, 0.0]]
    """
    boxes = boxes.double()
    placed = boxes.isfinite().all(-1)
    masses, boxes = masses[..., placed].double(), boxes[placed]
    across = _overlap(boxes[:, 0], boxes[:, 2], size[1], shown[1])
    down = _overlap(boxes[:, 1], boxes[:, 3], size[0], shown[0])
    # The largest intermediate is [.., row, patch]; of many heads, it is made one by one.
    flat = masses.reshape(prod(masses.shape[:-1]), masses.shape[-1])
    made = [(down * one[:, None]).T @ across for one in flat]
    return torch.stack(made).view(*masses.shape[:-1], *shown).to(torch.float32)


def _overlap(low: Tensor, high: Tensor, size: int, shown: int) -> Tensor:
    """[patch, pixel] the share of each patch's extent that lies in each pixel."""
    edges = torch.linspace(0, size, shown + 1, dtype=torch.float64)
    inside = torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])
    return inside.clamp(min=0) / (high - low)[:, None]
