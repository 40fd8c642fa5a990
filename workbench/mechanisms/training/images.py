"""What the image models see: one to three coloured digits and a coloured square. Which digit has the square's colour?

To read a digit is local, though digits cross patches; to choose the right one is global.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workbench.errors import WorkbenchError

SIDE, PATCH = 32, 4
_SLOT = 8  # pixels; a digit or the square in each
# Ten digits of 5 × 7 pixels, a row in the low bits of a byte.
_FONT = ("0e11131519110e", "040c040404040e", "0e11010204081f", "1f02040201110e", "02060a121f0202",
         "1f101e0101110e", "0608101e11110e", "1f010204080808", "0e11110e11110e", "0e11110f01020c")  # fmt: skip
_COLOURS = ((1.0, 0.1, 0.1), (0.1, 1.0, 0.1), (0.2, 0.3, 1.0), (1.0, 0.9, 0.1))


class Scenes(NamedTuple):
    """Images and what is in them.

    Attributes:
        images: [scene, 3, 32, 32]. classes: [scene], the digit of the square's colour.
        centres: [scene, 2], row and column of that digit. squares: [scene, 2], of the square.
    """

    images: Tensor
    classes: Tensor
    centres: Tensor
    squares: Tensor


def scenes(n: int, random: torch.Generator, n_digits: int | None = None, noise: float = 0.1) -> Scenes:
    """Draw scenes.

    Args:
        n_digits: in each scene; one to three, drawn, if None. With k of them, reading without choosing is right once
            in k times.
        noise: standard deviation of what is added to every pixel.

    Raises:
        WorkbenchError: no number of digits from 1 to 3.

    >>> drawn = scenes(5, torch.Generator().manual_seed(0))
    >>> drawn.images.shape, drawn.classes.shape
    (torch.Size([5, 3, 32, 32]), torch.Size([5]))
    """
    if n_digits is not None and not 1 <= n_digits <= 3:
        raise WorkbenchError(f"n_digits={n_digits} is not one of 1 to 3")
    slots = SIDE // _SLOT
    images = 0.3 * torch.rand(n, 1, 1, 1, generator=random) + noise * torch.randn(n, 3, SIDE, SIDE, generator=random)
    counts = torch.randint(1, 4, (n,), generator=random) if n_digits is None else torch.full((n,), n_digits)
    what, colour = (torch.rand(n, kinds, generator=random).argsort(1) for kinds in (10, 4))
    place = torch.rand(n, slots * slots, generator=random).argsort(1)[:, :4]  # of three digits and, last, of the square
    top = place // slots * _SLOT + torch.randint(0, 2, (n, 4), generator=random)
    left = place % slots * _SLOT + 2 * torch.randint(0, 2, (n, 4), generator=random)
    glyphs = _glyphs()
    for k in range(3):
        ink = glyphs[what[:, k]] * (counts > k)[:, None, None]
        _paint(images, ink, colour[:, k], top[:, k], left[:, k])
    row, column = place[:, 3] // slots * _SLOT, place[:, 3] % slots * _SLOT
    _paint(images, torch.ones(n, _SLOT, _SLOT), colour[:, 0], row, column)  # four whole patches
    centres = torch.stack([top[:, 0] + 3, left[:, 0] + 2], dim=1)
    return Scenes(images, what[:, 0], centres, torch.stack([row, column], dim=1) + _SLOT // 2)


def _glyphs() -> Tensor:
    """[digit, 7, 5] of ones and zeros."""
    return torch.tensor([[[float(row >> (4 - c) & 1) for c in range(5)] for row in bytes.fromhex(f)] for f in _FONT])


def _paint(images: Tensor, ink: Tensor, colour: Tensor, top: Tensor, left: Tensor) -> None:
    """Add ink [scene, height, width] in a colour at a place of each scene."""
    scene = torch.arange(len(images))[:, None, None, None]
    rows, columns = top[:, None] + torch.arange(ink.shape[1]), left[:, None] + torch.arange(ink.shape[2])
    paint = torch.tensor(_COLOURS)[colour][:, :, None, None] * ink[:, None]
    images[scene, torch.arange(3)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]] += paint
