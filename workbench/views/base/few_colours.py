"""Pictures in few colours, which makes files small: large areas and far colours stay exactly as they were."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from PIL.Image import Image


def few_colours(image: Image, most: int) -> Image:
    """The image with a palette of at most `most` of its own colours.

    Kept are the colours of the largest areas, such as paper, cells at zero and lines, and those that are farthest from
    all others that are kept, such as the end of a scale that a single cell has. The rest becomes the nearest of them.

    Args:
        most: from 2 to 256.

    >>> from PIL import Image
    >>> few_colours(Image.new("RGB", (4, 4), "#f7f7f4"), 16).convert("RGB").getpixel((0, 0))
    (247, 247, 244)
    """
    from PIL import Image

    pixels = np.asarray(image.convert("RGB"))
    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    places, found = pd.factorize(packed.ravel(), sort=True)  # as numpy.unique, which sorts all pixels
    counts = np.bincount(places)
    colours = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.int32)
    kept, nearest = _chosen(colours, counts, most)
    few = Image.fromarray(nearest[places].reshape(packed.shape).astype(np.uint8))
    few.putpalette(colours[kept].astype(np.uint8).tobytes())
    return few


def _chosen(colours: np.ndarray, counts: np.ndarray, most: int) -> tuple[list[int], np.ndarray]:
    """Which of the colours [n, 3] are kept, and for each colour which of those it becomes."""
    largest = np.argsort(-counts, kind="stable")
    large = list(largest[: most if len(colours) <= most else most // 2])
    kept: list[int] = []
    away = np.full(len(colours), np.iinfo(np.int32).max)
    nearest = np.zeros(len(colours), int)
    while len(kept) < min(most, len(colours)):
        kept.append(int(large[len(kept)] if len(kept) < len(large) else away.argmax()))
        far = np.square(colours - colours[kept[-1]]).sum(1)
        nearest[far < away] = len(kept) - 1
        away = np.minimum(away, far)
    return kept, nearest
