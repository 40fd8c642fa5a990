"""How a model lays the patches of its pictures out as tokens, read from its config and from what a processor made.

Each layout gives, for every picture, its tiles as grids of numbers: which of the features that the model makes of the
pictures stands for which patch. The features take the places of the image tokens, in order.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.hooks.configs import read


@dataclass(frozen=True)
class Grid:
    """A grid of features.

    Attributes:
        source: number of the image, or of the processed tile where pictures are given tile by tile.
        features: [row, column] which feature of the model is which patch; −1 for none.
        pixels: what the vision tower saw: [3, row, column], or the patches [patch, …] of the grid.
        shape: height and width that the vision tower saw.
        frames: first and last frame of a video; None of an image.
        part: (left, top, right, bottom) shares of the processed tile that the grid covers, where that is not all.
        region: (left, top, right, bottom) of `pixels` that the grid covers, where that is not all.
        tile: which of the processed tiles of its image it is.
    """

    source: int
    features: Tensor
    pixels: Tensor
    shape: tuple[int, int]
    frames: tuple[int, int] | None = None
    part: tuple[float, float, float, float] = (0, 0, 1, 1)
    region: tuple[float, float, float, float] | None = None
    tile: int = 0


@dataclass(frozen=True)
class Laid:
    """The grids of all pictures of one medium.

    Attributes:
        grids: in the order of the features. total: how many features the model makes, those of no patch included.
        by_tile: whether `source` counts processed tiles, so that a processor has to say whose they are.
    """

    grids: list[Grid]
    total: int
    by_tile: bool = False


def lay_out(model: nn.Module, inputs: Mapping[str, Any], medium: str, n_tokens: int) -> Laid:
    """The layout of the images or the videos of a batch.

    Args:
        medium: "image" or "video". n_tokens: how many tokens of the batch stand for them.

    Raises:
        WorkbenchError: pictures that are missing, or whose layout cannot be told; grids that do not fit.
    """
    vision = _vision_config(model)
    pixels = inputs.get("pixel_values" if medium == "image" else "pixel_values_videos")
    grid = inputs.get(f"{medium}_grid_thw")
    if not isinstance(pixels, Tensor):
        raise WorkbenchError(
            f"{n_tokens} tokens of the prompt stand for {medium}s, and no {medium} is among the inputs",
            hint="pass what the processor made of text and pictures together",
        )
    if grid is not None:
        return _flattened(model, vision, pixels, torch.as_tensor(grid), medium)
    if pixels.dim() not in (4, 5) or pixels.shape[-3] != 3:
        raise WorkbenchError(
            "how the pixels of pictures become tokens cannot be told without their grid",
            shape=pixels.shape,
            hint=f"pass {medium}_grid_thw, as the processor gives it",
        )
    inner = _packer(model)
    if medium == "image" and inner is not None and inputs.get("image_sizes") is not None:
        return _packed(inner, vision, pixels, torch.as_tensor(inputs["image_sizes"]), inputs.get("batch_num_images"))
    if medium == "video":
        return _video(inner, vision, pixels, n_tokens)
    return _squares(model, vision, pixels, n_tokens)


def _vision_config(model: nn.Module) -> Any:
    config = read(model, "config")
    vision = read(config, "vision_config")
    if vision is None:
        raise WorkbenchError(
            f"{type(model).__name__} has no config of a vision tower, which tells how large its patches are",
            hint="grounding reads vision-language models of transformers",
        )
    return vision


def _patch(vision: Any) -> tuple[int, int]:
    size = read(vision, "patch_size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise WorkbenchError(f"the config of the vision tower tells no patch size: {size!r}")


def _flattened(model: nn.Module, vision: Any, pixels: Tensor, grid: Tensor, medium: str) -> Laid:
    """Patches in one row, those that become one token after each other: Qwen2-VL and what followed it."""
    merge = read(vision, "spatial_merge_size")
    if not isinstance(merge, int):
        raise WorkbenchError("the config of the vision tower does not tell how many patches become one token")
    if grid.dim() != 2 or grid.shape[1] != 3 or bool((grid < 1).any()):
        raise WorkbenchError(f"{medium}_grid_thw holds (frames, rows, columns) of each {medium}", shape=grid.shape)
    counted = int(grid.prod(1).sum())
    if counted != len(pixels):
        raise WorkbenchError(
            f"{medium}_grid_thw counts {counted} patches, and there are {len(pixels)}",
            shape=grid.shape,
            hint="pass the grid that the processor gave with these pixels",
        )
    high, wide = _patch(vision)
    at_once = int(read(vision, "temporal_patch_size", 1))
    grids: list[Grid] = []
    done = seen = 0
    for source, (frames, rows, columns) in enumerate(grid.tolist()):
        if rows % merge or columns % merge:
            raise WorkbenchError(
                f"{medium} {source} has {rows} x {columns} patches, which do not make groups of {merge} x {merge}",
                hint="pass the grid as the processor gave it",
            )
        n = rows * columns // merge**2
        for frame in range(frames):
            features = torch.arange(done, done + n).view(rows // merge, columns // merge)
            shown = pixels[seen : seen + rows * columns]
            which = (frame * at_once, (frame + 1) * at_once - 1) if medium == "video" else None
            grids.append(Grid(source, features, shown, (rows * high, columns * wide), which))
            done, seen = done + n, seen + rows * columns
    return Laid(grids, done)


def _tiles(pixels: Tensor) -> list[list[Tensor]]:
    """The processed tiles [3, row, column] of each entry; all of a tile being zero says that there is none."""
    if pixels.dim() == 4:
        return [[one] for one in pixels]
    return [[one for one in several if bool(one.any())] for several in pixels]


def _side(vision: Any, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of a tile."""
    high, wide = _patch(vision)
    if pixels.shape[-2] < high or pixels.shape[-1] < wide:
        raise WorkbenchError("a tile is smaller than a patch", shape=pixels.shape)
    return pixels.shape[-2] // high, pixels.shape[-1] // wide


def _squares(model: nn.Module, vision: Any, pixels: Tensor, n_tokens: int) -> Laid:
    """Tiles of one size, each with as many tokens, in rows: LLaVA, InternVL, Gemma 3, Idefics 3."""
    tiles = [tile for several in _tiles(pixels) for tile in several]
    rows, columns = _side(vision, pixels)
    if not tiles or n_tokens % len(tiles):
        raise WorkbenchError(
            f"{n_tokens} tokens stand for {len(tiles)} tiles, which does not come out even",
            shape=pixels.shape,
            hint="pass the pictures that the processor was given with this text",
        )
    each = n_tokens // len(tiles)
    by, first = _merged(each, rows, columns)
    if first and not _keeps_class_token(model):
        by = 0
    if not by:
        raise WorkbenchError(
            f"a tile has {rows} x {columns} patches and {each} tokens: how patches become tokens cannot be told",
            hint="its tokens are no grid of equal groups of patches",
        )
    high, wide = rows // by, columns // by
    grids = [
        Grid(n, torch.arange(n * each + first, (n + 1) * each).view(high, wide), tile,
             (tile.shape[1], tile.shape[2]), tile=0)
        for n, tile in enumerate(tiles)
    ]  # fmt: skip
    return Laid(grids, len(tiles) * each, by_tile=True)


def _merged(each: int, rows: int, columns: int) -> tuple[int, int]:
    """How many patches along an edge make one token, and whether a class token stands before them; 0 for neither."""
    for first in (0, 1):
        for by in range(1, min(rows, columns) + 1):
            if rows % by == 0 and columns % by == 0 and (rows // by) * (columns // by) == each - first:
                return by, first
    return 0, 0


def _keeps_class_token(model: nn.Module) -> bool:
    return bool(read(read(model, "config"), "vision_feature_select_strategy") == "full")


def _packer(model: nn.Module) -> nn.Module | None:
    """The module that packs tiles of several sizes into one row of features: LLaVA-NeXT and LLaVA-OneVision."""
    return next((one for one in model.modules() if hasattr(one, "get_image_features")
                 and hasattr(one, "pack_image_features") and hasattr(one, "image_newline")), None)  # fmt: skip


def _packed(inner: Any, vision: Any, pixels: Tensor, sizes: Tensor, per_example: Any) -> Laid:
    """A whole view of an image, then its tiles side by side without their padding, with a token that ends each row.

    The model's own code packs numbers here in place of features, so that each says where it went.
    """
    rows, columns = _side(vision, pixels)
    if rows != columns:
        raise WorkbenchError("tiles that are no squares are not packed", shape=pixels.shape)
    if sizes.dim() != 2 or sizes.shape[1] != 2 or len(sizes) != len(pixels):
        raise WorkbenchError(
            f"image_sizes holds the height and width of each image, and there are {len(pixels)} images",
            shape=sizes.shape,
        )
    tiled = _tiled(inner, sizes, per_example, int(read(vision, "image_size")))
    tiles = [list(one[:n]) if pixels.dim() == 5 else [one] for one, n in zip(pixels, tiled, strict=True)]
    if any(len(one) != n for one, n in zip(tiles, tiled, strict=True)):
        raise WorkbenchError(f"images of these sizes have {tiled} tiles, and other numbers were given",
                             shape=pixels.shape, hint="pass pixels and image_sizes of one processor call")  # fmt: skip
    n, grids, done = rows * columns, [], 0
    for source, several in enumerate(tiles):
        made, whole = _pack_one(inner, len(several), n, sizes[source : source + 1])
        if len(made.flatten()) and made.isfinite().any() and bool((made.nan_to_num() % 1 != 0).any()):
            grids += _resampled(made, whole, source, several, n, (rows, columns), done)
        else:
            grids += _as_packed(made, source, several, n, (rows, columns), done)
        done += len(made)
    return Laid(grids, done)


def _tiled(inner: Any, sizes: Tensor, per_example: Any, size: int) -> list[int]:
    """How many processed tiles each image has, the whole view among them."""
    count = sys.modules[type(inner).__module__].image_size_to_num_patches
    alone = [True] * len(sizes)
    if per_example is not None:
        alone = [int(n) == 1 for n in per_example for _ in range(int(n))]
    points = inner.config.image_grid_pinpoints
    return [int(count(one.tolist(), points, size)) if tiles else 1 for one, tiles in zip(sizes, alone, strict=True)]


def _pack_one(inner: Any, n_tiles: int, n: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """[feature] the number of each feature that is packed, NaN at the ends of rows; and as it is without resampling."""
    numbers = torch.arange(n_tiles * n, dtype=torch.float64).view(n_tiles, n, 1)
    end = torch.full((1,), torch.nan, dtype=torch.float64)
    how: dict[str, Any] = {"image_sizes": size, "image_newline": end}
    names = inner.pack_image_features.__code__.co_varnames
    if "vision_feature_select_strategy" in names:
        how["vision_feature_select_strategy"] = "default"
    resampling = "vision_aspect_ratio" in names
    stated = read(inner.config, "vision_aspect_ratio", "anyres_max_9")
    made, _ = inner.pack_image_features([numbers], **how, **({"vision_aspect_ratio": stated} if resampling else {}))
    free = {"vision_aspect_ratio": "anyres_max_1000000"} if resampling else {}
    whole, _ = inner.pack_image_features([numbers], **how, **free)
    return made[0][:, 0], whole[0][:, 0]


def _as_packed(
    made: Tensor, source: int, several: Sequence[Tensor], n: int, grid: tuple[int, int], done: int
) -> list[Grid]:
    """Every feature is one patch of one tile."""
    grids = []
    for tile, pixels in enumerate(several):
        features = torch.full((n,), -1)
        here = ((made >= tile * n) & (made < (tile + 1) * n)).nonzero()[:, 0]
        features[made[here].long() - tile * n] = here + done
        shape = (pixels.shape[1], pixels.shape[2])
        grids.append(Grid(source, features.view(grid), pixels, shape, tile=tile))
    return grids


def _resampled(
    made: Tensor, whole: Tensor, source: int, several: Sequence[Tensor], n: int, grid: tuple[int, int], done: int
) -> list[Grid]:
    """Tiles of large images are resampled to fewer features: one grid over all of them, as far as they are no padding.

    Its part is told in shares of the first tile; its edges may lie beyond 1.
    """
    base = torch.arange(n) + done
    first = Grid(source, base.view(grid), several[0], (several[0].shape[1], several[0].shape[2]), tile=0)
    ends = made[n:].isnan().nonzero()[:, 0]
    columns = int(ends[0])
    rows = len(ends)
    features = (torch.arange(rows)[:, None] * (columns + 1) + torch.arange(columns) + n + done).long()
    kept = whole[n:]
    wide = int(kept.isnan().nonzero()[0, 0])
    numbers = kept.view(-1, wide + 1)[:, :-1].long() - n  # of the patches that are no padding
    patch = numbers % n
    tile = numbers // n
    corner = patch[0, 0]
    left, top = int(corner) % grid[1], int(corner) // grid[1]
    part = (left / grid[1], top / grid[0], (left + numbers.shape[1]) / grid[1], (top + numbers.shape[0]) / grid[0])
    start = int(tile[0, 0])
    down, across = len(tile[:, 0].unique()), len(tile[0].unique())
    wide_tiles = int(tile[-1, 0] - tile[0, 0]) // (down - 1) if down > 1 else across
    strips = [torch.cat([several[1 + start + r * wide_tiles + c] for c in range(across)], 2) for r in range(down)]
    canvas = torch.cat(strips, 1)
    high, long = several[0].shape[1:]
    region = (part[0] * long, part[1] * high, part[2] * long, part[3] * high)
    shape = (canvas.shape[1], canvas.shape[2])
    return [first, Grid(source, features, canvas, shape, part=part, region=region, tile=1 + start)]


def _video(inner: Any, vision: Any, pixels: Tensor, n_tokens: int) -> Laid:
    """Frames of one size, pooled, one after another; where rows of images are ended, so is the video."""
    pixels = pixels if pixels.dim() == 5 else pixels[None]
    rows, columns = _side(vision, pixels)
    end = 0 if inner is None else 1
    n_videos, n_frames = pixels.shape[:2]
    if n_tokens % n_videos or (n_tokens // n_videos - end) % n_frames:
        raise WorkbenchError(
            f"{n_tokens} tokens stand for {n_videos} videos of {n_frames} frames, which does not come out even",
            shape=pixels.shape,
        )
    total = n_tokens // n_videos
    each = (total - end) // n_frames
    by = next((b for b in range(1, rows + 1) if -(-rows // b) * -(-columns // b) == each), 0)
    if not by:
        raise WorkbenchError(f"a frame has {rows} x {columns} patches and {each} tokens: how cannot be told")
    grids = [
        Grid(v, (torch.arange(each) + v * total + f * each).view(-(-rows // by), -(-columns // by)), pixels[v, f],
             (pixels.shape[3], pixels.shape[4]), frames=(f, f))
        for v in range(n_videos) for f in range(n_frames)
    ]  # fmt: skip
    return Laid(grids, n_videos * total)
