"""Screens with windows, buttons, fields and texts of many sizes, what each is called, and where it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import TaskError

SIDE, PATCH = 96, 8
ROWS = SIDE // PATCH
KINDS = ("button", "field", "text")
COLOURS = {"red": (215, 60, 60), "green": (60, 170, 80), "blue": (60, 100, 220), "black": (30, 30, 30)}
ELEMENTS = 6
LETTERS = 6
"""Of the name that each element has: a letter of 26 each."""
_SLOTS = (4, 3)  # rows and columns of places, one element in each at most


@dataclass(frozen=True)
class Screens:
    """Screens and the elements on them; the first of each screen is asked for.

    Attributes:
        pixels: [screen, 3, row, column] from −1 to 1.
        boxes: [screen, element, 4] (x0, y0, x1, y1) in pixels.
        kinds, colours: [screen, element] numbers in `KINDS` and `COLOURS`; no two elements share both.
        names: [screen, element, letter] what is written on it, from 0 to 25.
    """

    pixels: Tensor
    boxes: Tensor
    kinds: Tensor
    colours: Tensor
    names: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def asked(self) -> Tensor:
        """[screen] number of the kind and colour that are asked for."""
        return self.kinds[:, 0] * len(COLOURS) + self.colours[:, 0]


def draw_screens(n: int, seed: int | torch.Generator = 0) -> Screens:
    """Draw screens of 96 x 96 pixels: a desktop, a window or two, and six elements from 5 x 4 to 30 x 20 pixels.

    Raises:
        TaskError: no screen.

    >>> drawn = draw_screens(2, seed=0)
    >>> tuple(drawn.pixels.shape), tuple(drawn.boxes.shape)
    ((2, 3, 96, 96), (2, 6, 4))
    """
    if n < 1:
        raise TaskError(f"{n} screens", hint="at least one")
    random = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    # Which paint each pixel has: the desktop, then of two windows their ground and their bar, white, and the colours.
    paints = torch.zeros(n, 6 + len(COLOURS), 3)
    paints[:, 0], paints[:, 5] = 140 + 60 * rand(n, 3), 255.0
    paints[:, 6:] = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    paint = torch.zeros(n, SIDE, SIDE, dtype=torch.uint8)
    for window in range(2):
        corner, size = (rand(n, 2) * 40).long(), 40 + (rand(n, 2) * 40).long()
        inside = _within(x, y, corner[:, 0], corner[:, 1], corner[:, 0] + size[:, 0], corner[:, 1] + size[:, 1])
        paints[:, 1 + 2 * window], paints[:, 2 + 2 * window] = 225 + 25 * rand(n, 1), 90 + 40 * rand(n, 1)
        paint[inside] = 1 + 2 * window
        paint[inside & (y < corner[:, 1, None, None] + 5)] = 2 + 2 * window
    rows, columns = _SLOTS
    slot = rand(n, rows * columns).argsort(1)[:, :ELEMENTS]
    which = rand(n, len(KINDS) * len(COLOURS)).argsort(1)[:, :ELEMENTS]
    kinds, colours = which // len(COLOURS), which % len(COLOURS)
    high, wide = SIDE // rows, SIDE // columns
    # Even on a scale of sizes, so that small ones are as many as large ones.
    width = (5 * 6 ** rand(n, ELEMENTS)).long().clamp(max=wide - 2)
    height = (4 * 5 ** rand(n, ELEMENTS)).long().clamp(max=high - 2)
    left = slot % columns * wide + 1 + (rand(n, ELEMENTS) * (wide - 1 - width)).long()
    top = slot // columns * high + 1 + (rand(n, ELEMENTS) * (high - 1 - height)).long()
    names = (rand(n, ELEMENTS, LETTERS) * 26).long()
    for k in range(ELEMENTS):
        box = (left[:, k], top[:, k], left[:, k] + width[:, k], top[:, k] + height[:, k])
        inside, core = _within(x, y, *box), _within(x, y, box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1)
        stripes = inside & ((x - left[:, k, None, None]) % 2 == 0) & ((y - top[:, k, None, None]) % 4 != 3)
        kind = kinds[:, k, None, None]
        paint[core & (kind == 1)] = 5
        ink = torch.where(kind == 0, inside, torch.where(kind == 1, inside & ~core, stripes))
        paint = torch.where(ink, (6 + colours[:, k, None, None]).to(torch.uint8), paint)
    screens = paints[torch.arange(n)[:, None, None], paint.long()]
    screens = screens + 6 * torch.randn(screens.shape, generator=random)
    boxes = torch.stack([left, top, left + width, top + height], -1).float()
    return Screens((screens / 127.5 - 1).permute(0, 3, 1, 2).contiguous(), boxes, kinds, colours, names)


def _within(x: Tensor, y: Tensor, left: Tensor, top: Tensor, right: Tensor, bottom: Tensor) -> Tensor:
    """[screen, row, column] which pixels lie in a box of each screen."""
    left, top, right, bottom = (edge[:, None, None] for edge in (left, top, right, bottom))
    return (x >= left) & (x < right) & (y >= top) & (y < bottom)
