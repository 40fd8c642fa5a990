"""`image_places`: which tokens of a prompt are which patches of which pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.analysis.grounding import geometry
from workbench.analysis.grounding.layouts import Grid, Laid, lay_out
from workbench.analysis.grounding.proof import check_proved
from workbench.analysis.grounding.tiles import Box, ImagePlaces, Picture, Tile
from workbench.errors import WorkbenchError, expect
from workbench.hooks.configs import read
from workbench.session.workbench import Workbench
from workbench.storage.provenance import find_patches

_SHOWN = 384  # pixels along an edge of a picture that is kept to be shown
_MEDIA = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}


def image_places(
    wb: Workbench,
    inputs: Mapping[str, Any],
    images: Sequence[Any] | None = None,
    processor: Any = None,
    *,
    example: int = 0,
    **settings: Any,
) -> ImagePlaces:
    """Where the patches of images and video frames stand among the tokens of a prompt, and on the pictures.

    Positions come from the model's image token, its config and the grids, sizes and pixels that the processor made, and
    nothing is guessed: what does not fit is an error. Where the tiles lie on the images is asked of the processor,
    which is run on a picture whose colours are coordinates; boxes are right to a fraction of a processed pixel.
    Without `images` and `processor`, pictures are what the vision tower saw, tile by tile.

    Args:
        wb: a vision-language model of `transformers`, attached. One of a type that these layouts were not proved on is
            run on changed pixels first, see `prove`.
        inputs: what the processor made of text and pictures: input_ids [batch, position] with one token for each
            feature of an image, pixel_values, and grids or sizes where the model takes them. Without input_ids, those
            of an encoder-decoder whose cross-attention reads the patches.
        images: the pictures of that prompt alone, in their order: PIL images, or arrays [row, column, 3] from 0 to
            255. Frames of videos are shown as the vision tower saw them.
        processor: the model's processor or image processor. settings: what it was given beside the pictures.
        example: which row of the batch.

    Raises:
        WorkbenchError: no image among the inputs or tokens, grids or images that do not fit the processor's, or a model
            whose layout cannot be told.
    """
    expect(Workbench, wb=wb)
    expect(Mapping, inputs=inputs)
    wb.check_open()
    net = wb.model
    if read(read(net, "config"), "is_encoder_decoder", False) and inputs.get("input_ids") is None:
        return _encoded(net, inputs, images, processor, example, settings)
    ids = _ids(inputs, example)
    found: list[tuple[Picture, list[Tile]]] = []
    others: list[int] = []
    if images is not None and processor is None:
        raise WorkbenchError("how images were resized and cropped is the processor's", hint="pass processor= too")
    for medium in _MEDIA:
        token = _token(net, medium)
        flat = None if token is None else (ids == token).nonzero()
        if flat is not None and len(flat):
            shown, ends = _of_medium(net, inputs, medium, flat, example, images, processor, settings)
            found, others = found + shown, others + ends
    if not found:
        raise WorkbenchError(
            "no token of the prompt stands for an image", shape=ids.shape,
            hint="pass input_ids from the processor, which writes an image token for each feature of an image",
        )  # fmt: skip
    found.sort(key=lambda one: min(_first(tile) for tile in one[1]))
    pictures = tuple(picture for picture, _ in found)
    check_proved(wb, inputs)
    tiles = tuple(replace(tile, picture=n) for n, (_, several) in enumerate(found) for tile in several)
    return ImagePlaces(pictures, tiles, tuple(sorted(others)), ids.shape[1], example, _stack(net),
                       ids[example], _first_real(inputs, example))  # fmt: skip


def _encoded(
    model: Any, inputs: Mapping[str, Any], images: Sequence[Any] | None, processor: Any, example: int,
    settings: Mapping[str, Any],
) -> ImagePlaces:  # fmt: skip
    """The patches of a picture that an encoder gives to cross-attention: a row of them behind its class tokens."""
    pixels, encoder = inputs.get("pixel_values"), read(model, "encoder")
    known = None if encoder is None else find_patches(encoder)
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or known is None:
        raise WorkbenchError(
            f"where a {type(model).__name__} has the patches of a picture cannot be told",
            hint="it needs pixel_values [image, 3, row, column] and an encoder that tells of its patches",
        )
    if not 0 <= example < len(pixels):
        raise WorkbenchError(f"the batch has {len(pixels)} examples, and no example {example}")
    (rows, columns), prefix = known["grid"], known["prefix"]
    shape = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    features = torch.arange(rows * columns).view(rows, columns)
    grid = Grid(0, features, pixels[example], shape)
    whose = (
        _own([grid], "image")
        if images is None
        else _whose(Laid([grid], rows * columns, by_tile=True), [grid], images, processor, settings)
    )
    name, _, boxes, picture = whose[0]
    tile = Tile(0, name, features + prefix, boxes[0])
    return ImagePlaces((picture,), (tile,), tuple(range(prefix)), prefix + rows * columns, example, _stack(model),
                       crossed=True)  # fmt: skip


def _first_real(inputs: Mapping[str, Any], example: int) -> int:
    mask = inputs.get("attention_mask")
    return int(mask[example].int().argmax()) if isinstance(mask, Tensor) and mask.dim() == 2 else 0


def _first(tile: Tile) -> int:
    """Where a tile begins in the prompt; behind its end where none of its patches has a token."""
    placed = tile.positions[tile.positions >= 0]
    return int(placed.min()) if len(placed) else 1 << 40


def _ids(inputs: Mapping[str, Any], example: int) -> Tensor:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise WorkbenchError("the inputs hold no input_ids [batch, position]", hint="pass what the processor made")
    if not 0 <= example < len(ids):
        raise WorkbenchError(f"the batch has {len(ids)} examples, and no example {example}")
    return ids.detach().cpu()


def _token(model: nn.Module, medium: str) -> int | None:
    config = read(model, "config")
    return next((found for name in _MEDIA[medium] if isinstance(found := read(config, name), int)), None)


def _stack(model: Any) -> str:
    """Path of the language model, whose attentions have the prompt as their keys."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else None
    return next((name for name, one in model.named_modules() if one is inner), "")


def _of_medium(
    model: nn.Module, inputs: Mapping[str, Any], medium: str, flat: Tensor, example: int,
    images: Sequence[Any] | None, processor: Any, settings: Mapping[str, Any],
) -> tuple[list[tuple[Picture, list[Tile]]], list[int]]:  # fmt: skip
    """The pictures of the example with their tiles, and the positions of tokens that are no patch of them."""
    laid = lay_out(model, inputs, medium, len(flat))
    if laid.total != len(flat):
        raise WorkbenchError(
            f"the {medium}s make {laid.total} features, and {len(flat)} tokens of the prompt stand for them",
            hint="pass text and pictures of one processor call",
        )
    grids = [grid for grid in laid.grids if _in_example(grid, flat, example)]
    if not grids:
        return [], []
    by_processor = images is not None and medium == "image"
    whose = _whose(laid, grids, images, processor, settings) if by_processor else _own(grids, medium)
    made = []
    for name, several, boxes, picture in whose:
        names = [name if len(several) == 1 else f"{name}, tile {i}" for i in range(len(several))]
        tiles = [Tile(0, n, _positions(g, flat), box) for n, g, box in zip(names, several, boxes, strict=True)]
        made.append((picture, tiles))
    patches = torch.cat([tile.positions.flatten() for _, tiles in made for tile in tiles])
    mine = flat[flat[:, 0] == example, 1]
    return made, mine[~torch.isin(mine, patches)].tolist()


def _in_example(grid: Grid, flat: Tensor, example: int) -> bool:
    rows = flat[grid.features[grid.features >= 0], 0].unique()
    if len(rows) > 1:
        raise WorkbenchError("the tokens of one image lie in several prompts of the batch")
    return bool(len(rows)) and int(rows[0]) == example


def _positions(grid: Grid, flat: Tensor) -> Tensor:
    return flat[grid.features.clamp(min=0), 1].where(grid.features >= 0, -1)


def _own(grids: Sequence[Grid], medium: str) -> list[tuple[str, list[Grid], list[Box | None], Picture]]:
    """Each grid as a picture of its own: what the vision tower saw."""
    made: list[tuple[str, list[Grid], list[Box | None], Picture]] = []
    several = len({grid.source for grid in grids}) < len(grids)
    first = grids[0].source
    for grid in grids:
        name = f"{medium} {grid.source - first}"
        if grid.frames is not None:
            name += f", frame {grid.frames[0]}" if grid.frames[0] == grid.frames[1] else (
                f", frames {grid.frames[0]} to {grid.frames[1]}")  # fmt: skip
        elif several:
            name += f", tile {grid.tile}"
        height, width = grid.shape
        box = grid.region or (0.0, 0.0, float(width), float(height))
        made.append((name, [grid], [box], Picture(name, grid.shape, _seen(grid))))
    return made


def _whose(
    laid: Laid, grids: Sequence[Grid], images: Sequence[Any] | None, processor: Any, settings: Mapping[str, Any]
) -> list[tuple[str, list[Grid], list[Box | None], Picture]]:
    """The grids of each image, and their boxes on it, by the processor."""
    arrays = [_array(image, i) for i, image in enumerate(images or ())]
    rest = list(grids)
    made = []
    for number, array in enumerate(arrays):
        size = (array.shape[0], array.shape[1])
        pixels, thw = geometry.processed(processor, size, settings)
        if thw is not None:
            mine, boxes = _one_grid(rest[:1], pixels, thw, size, number)
            rest = rest[1:]
        elif laid.by_tile:
            mine, rest = rest[: len(pixels)], rest[len(pixels) :]
            boxes = [geometry.box_of(tile, size) for tile in pixels]
            shapes = {tuple(tile.shape[1:]) for tile in pixels}
            if len(mine) < len(pixels) or any(grid.shape not in shapes for grid in mine):
                raise _misfit(number, size, f"{len(pixels)} tiles of {sorted(shapes)}", len(mine))
        else:
            mine = [grid for grid in rest if grid.source == rest[0].source] if rest else []
            rest = rest[len(mine) :]
            if not mine or max(grid.tile for grid in mine) >= len(pixels):
                raise _misfit(number, size, f"{len(pixels)} tiles", len(mine))
            boxes = [_part(geometry.box_of(pixels[grid.tile], size), grid.part) for grid in mine]
        picture = picture_of(array, number)
        made.append((picture.name, mine, boxes, picture))
    if rest or not arrays:
        raise WorkbenchError(
            f"{len(arrays)} images were given, and the prompt has more: {len(rest)} grids are nobody's",
            hint="pass all images of the prompt, in their order",
        )
    return made


def picture_of(image: Any, number: int) -> Picture:
    """An image that was given, to be shown.

    Raises:
        WorkbenchError: it is no picture [row, column, 3] of numbers from 0 to 255.
    """
    array = _array(image, number)
    return Picture(f"image {number}", (array.shape[0], array.shape[1]), _small(torch.as_tensor(array)))


def _misfit(number: int, size: tuple[int, int], expected: str, n: int) -> WorkbenchError:
    return WorkbenchError(
        f"the processor makes {expected} of image {number} of {size[0]} x {size[1]}, and the inputs have {n}",
        hint="pass the images that the inputs were made of, and the processor's settings that were used",
    )


def _one_grid(
    rest: Sequence[Grid], pixels: Tensor, thw: Tensor, size: tuple[int, int], number: int
) -> tuple[list[Grid], list[Box | None]]:
    if not rest:
        raise _misfit(number, size, "a grid", 0)
    rows, columns = (int(n) for n in thw[0, 1:])
    high, wide = rest[0].features.shape
    if rows % high or columns % wide or rows // high != columns // wide or rows * columns != len(rest[0].pixels):
        raise WorkbenchError(
            f"the processor lays image {number} of {size[0]} x {size[1]} out as {rows} x {columns} patches, and the "
            f"inputs have {high} x {wide} tokens of {len(rest[0].pixels)} patches",
            hint="pass the images that the inputs were made of, in their order",
        )
    geometry.check_flattened(pixels, thw, rows // high, size)
    return list(rest), [(0.0, 0.0, float(size[1]), float(size[0]))]


def _part(box: Box | None, part: tuple[float, float, float, float]) -> Box | None:
    if box is None:
        return None
    x0, y0, x1, y1 = box
    left, top, right, bottom = part
    width, height = x1 - x0, y1 - y0
    return x0 + left * width, y0 + top * height, x0 + right * width, y0 + bottom * height


def _array(image: Any, number: int) -> np.ndarray[Any, Any]:
    """An image [row, column, 3] of numbers from 0 to 255."""
    if hasattr(image, "convert"):
        image = image.convert("RGB")
    found = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
    found = found[..., None].repeat(3, -1) if found.ndim == 2 else found
    if found.ndim != 3 or found.shape[-1] != 3 or not found.size or found.dtype.kind not in "uif":
        raise WorkbenchError(
            f"image {number} is no picture [row, column, 3]", shape=found.shape, hint="pass PIL images or such arrays"
        )
    if not np.isfinite(found).all() or found.min() < 0 or found.max() > 255:
        raise WorkbenchError(f"image {number} holds values outside of 0 to 255")
    return np.ascontiguousarray(found.round().astype(np.uint8))


def _small(pixels: Tensor) -> Tensor:
    """[row, column, 3] in bytes, at most `_SHOWN` along an edge."""
    larger = max(pixels.shape[:2]) / _SHOWN
    if larger > 1:
        size = [max(1, round(side / larger)) for side in pixels.shape[:2]]
        moved = torch.nn.functional.interpolate(pixels.permute(2, 0, 1)[None].float(), size, mode="area")
        pixels = moved[0].permute(1, 2, 0).round()
    return pixels.to(torch.uint8).contiguous()


def _seen(grid: Grid) -> Tensor:
    """What the vision tower saw of a grid, its values stretched to 0 to 255."""
    pixels = grid.pixels.detach().cpu().float()
    if pixels.dim() == 2:  # patches in groups, each [channel, frame, row, column]
        rows, columns = grid.features.shape
        merge = int((len(pixels) / (rows * columns)) ** 0.5)
        high, wide = grid.shape[0] // (rows * merge), grid.shape[1] // (columns * merge)
        patches = pixels.view(rows, columns, merge, merge, 3, -1, high, wide)[:, :, :, :, :, 0]
        pixels = patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, *grid.shape)
    low, high_ = pixels.min(), pixels.max()
    return _small(((pixels - low) / (high_ - low).clamp(min=1e-12) * 255).round().permute(1, 2, 0))
