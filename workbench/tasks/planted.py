"""Pictures with objects that were put there, a question about one of them, and the box that it fills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import TaskError

SIDE, PATCH = 48, 8
"""Pixels along an edge of a picture, and of a patch of `demo-vlm`."""
SHAPES = ("square", "disc", "cross", "triangle", "ring")
COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230), "yellow": (235, 220, 50),
           "purple": (170, 60, 200)}  # fmt: skip
WORDS = ("colour", "of", "the")
IMAGE = "<image>"


@dataclass(frozen=True)
class PlantedObjects:
    """Pictures of several objects of different shapes and colours, and which colour one shape has.

    Attributes:
        pictures: [picture, row, column, 3] in bytes.
        all_shapes, all_colours: of each picture, those of its objects; the first is asked for.
        all_boxes: [picture, object, 4] (x0, y0, x1, y1) of the objects in pixels.
    """

    pictures: Tensor
    all_shapes: tuple[tuple[str, ...], ...]
    all_colours: tuple[tuple[str, ...], ...]
    all_boxes: Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def asked(self) -> tuple[str, ...]:
        """The shape that each picture is asked for."""
        return tuple(shapes[0] for shapes in self.all_shapes)

    @property
    def answers(self) -> tuple[str, ...]:
        """Its colour."""
        return tuple(colours[0] for colours in self.all_colours)

    @property
    def boxes(self) -> Tensor:
        """[picture, 4] its box."""
        return self.all_boxes[:, 0]

    def prompts(self) -> list[str]:
        """The questions, as text: an image token for each patch, and "colour of the ring"."""
        patches = " ".join([IMAGE] * (SIDE // PATCH) ** 2)
        return [f"<bos> {patches} {' '.join(WORDS)} {shape}" for shape in self.asked]

    def inputs(self, tokenizer: Any, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """What `demo-vlm` is given: input_ids, attention_mask and pixel_values from −1 to 1.

        Args:
            rows: of these pictures; None for all.
        """
        chosen = list(range(len(self))) if rows is None else list(rows)
        texts = self.prompts()
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(texts[i].split()) for i in chosen])
        pixels = self.pictures[chosen].permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def planted_objects(
    n: int, seed: int | torch.Generator = 0, *, objects: int = 3, cell: int = PATCH, noise: float = 12.0
) -> PlantedObjects:
    """Draw pictures of 48 x 48 pixels with objects on grey, each in a cell of its own, and ask for the colour of one.

    No two objects of a picture share a shape or a colour, so that the right one has to be found by its shape.

    Args:
        objects: in each picture, 1 to 5.
        cell: edge of a cell in pixels, a divisor of 48; an object takes three quarters of it to all. With 8, each lies
            in one patch of `demo-vlm`.
        noise: standard deviation of what is added to each pixel, of 255.

    Raises:
        TaskError: no picture, a number of objects outside of 1 to 5, or cells that do not fill the picture.

    >>> drawn = planted_objects(2, seed=1)
    >>> tuple(drawn.pictures.shape), drawn.asked[0] in SHAPES
    ((2, 48, 48, 3), True)
    """
    if n < 1 or not 1 <= objects <= len(SHAPES):
        raise TaskError(f"{n} pictures of {objects} objects", hint="at least one picture, of 1 to 5 objects")
    if cell < 4 or SIDE % cell or (SIDE // cell) ** 2 < objects:
        raise TaskError(f"cells of {cell} pixels", hint=f"a divisor of {SIDE} from 4 on, with a cell for each object")
    random = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    slots = SIDE // cell
    shape, colour, slot = (
        torch.rand(n, k, generator=random).argsort(1)[:, :objects] for k in (len(SHAPES), len(COLOURS), slots**2)
    )
    size = torch.randint(3 * cell // 4, cell + 1, (n, objects), generator=random)
    room = cell - size
    top = slot // slots * cell + (torch.rand(n, objects, generator=random) * (room + 1)).long()
    left = slot % slots * cell + (torch.rand(n, objects, generator=random) * (room + 1)).long()
    grey = 70 + 60 * torch.rand(n, 1, 1, 1, generator=random)
    pictures = grey.expand(n, SIDE, SIDE, 3).clone()
    paints = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for k in range(objects):
        wide = size[:, k, None, None].float()
        v = (y - top[:, k, None, None] + 0.5) / wide * 2 - 1  # −1 to 1 within the box
        u = (x - left[:, k, None, None] + 0.5) / wide * 2 - 1
        ink = torch.stack([_inside(name, u, v) for name in SHAPES], 1)[torch.arange(n), shape[:, k]]
        pictures = torch.where(ink[..., None], paints[colour[:, k]][:, None, None], pictures)
    pictures += noise * torch.randn(pictures.shape, generator=random)
    names = list(COLOURS)
    return PlantedObjects(
        pictures=pictures.clamp(0, 255).round().to(torch.uint8),
        all_shapes=tuple(tuple(SHAPES[i] for i in row) for row in shape.tolist()),
        all_colours=tuple(tuple(names[i] for i in row) for row in colour.tolist()),
        all_boxes=torch.stack([left, top, left + size, top + size], -1).float(),
    )


def _inside(name: str, u: Tensor, v: Tensor) -> Tensor:
    """Whether a point of a box, from −1 to 1 both ways, belongs to a shape."""
    box = (u.abs() < 1) & (v.abs() < 1)
    far = u**2 + v**2
    if name == "square":
        return box
    if name == "disc":
        return box & (far < 1)
    if name == "ring":
        return box & (far < 1) & (far > 0.3)
    if name == "cross":
        return box & ((u.abs() < 0.34) | (v.abs() < 0.34))
    return box & (u.abs() < (v + 1) / 2)  # a triangle that stands on its base
