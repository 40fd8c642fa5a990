"""What is masked together: superpixels of a spectrogram or image at several granularities, frames, tokens, patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workbench.errors import WorkbenchError

GRANULARITIES = (2000, 2500, 3000)
"""Superpixels at the reference length of 500 frames, as in SPES (Fucci et al. 2024, arXiv 2411.01710)."""
_REFERENCE_FRAMES, _LONGEST = 500, 750


def superpixels(
    picture: Tensor,
    granularities: Sequence[int] = GRANULARITIES,
    *,
    compactness: float = 0.1,
    sigma: float = 1.0,
    by_length: bool = True,
) -> tuple[Tensor, ...]:
    """SLIC superpixels (Achanta et al. 2012) of a spectrogram [time, frequency] or image [channel, row, column].

    Computed on the picture scaled to 0 … 1. SPES asks for n = round(n_g · min(T, 750) / 500) of them, at least one, for
    each granularity n_g; without `by_length` n = n_g.

    Returns:
        Per granularity [time, frequency] or [row, column], segments numbered from 0 without gaps.

    Raises:
        WorkbenchError: scikit-image is not installed, or a granularity is below 1.
    """
    try:
        from skimage.segmentation import slic
    except ModuleNotFoundError as error:
        raise WorkbenchError("superpixels need scikit-image", hint="pip install scikit-image") from error
    if not granularities or min(granularities) < 1:
        raise WorkbenchError(f"granularities are numbers of segments, at least 1, not {list(granularities)}")
    values = picture.detach().double().cpu().numpy()
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    colours = scaled.ndim == 3
    frames = scaled.shape[-2]
    found = []
    for target in granularities:
        n = max(1, round(target * min(frames, _LONGEST) / _REFERENCE_FRAMES)) if by_length else target
        labels = slic(
            scaled, n_segments=n, compactness=compactness, sigma=sigma, channel_axis=0 if colours else None,
            start_label=0,
        )  # fmt: skip
        found.append(_numbered(torch.from_numpy(np.ascontiguousarray(labels)).long()))
    return tuple(found)


def each(n: int) -> tuple[Tensor, ...]:
    """Every position a segment of its own: frames of the encoder's output, tokens."""
    return (torch.arange(n),)


def runs(n: int, parts: int) -> tuple[Tensor, ...]:
    """`parts` runs of neighbouring positions, of nearly equal length.

    >>> runs(5, 2)[0].tolist()
    [0, 0, 0, 1, 1]
    """
    return (torch.arange(n) * min(parts, n) // n,)


def patches(rows: int, columns: int, height: int, width: int) -> tuple[Tensor, ...]:
    """[height, width] the patch of each pixel, in raster order."""
    down = torch.arange(height) * rows // height
    across = torch.arange(width) * columns // width
    return (down[:, None] * columns + across,)


def checked(segments: Sequence[Tensor] | Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """A user's segments, one map or several, each of integers over the explained positions.

    Raises:
        WorkbenchError: a map has another shape or is not of integers.
    """
    several = [segments] if isinstance(segments, Tensor) else list(segments)
    for one in several:
        if not isinstance(one, Tensor) or one.is_floating_point() or tuple(one.shape) != shape:
            raise WorkbenchError(
                f"segments are integers over the explained positions {list(shape)}",
                shape=getattr(one, "shape", None),
            )
    if not several:
        raise WorkbenchError("there are no segments")
    return tuple(_numbered(one.long().cpu()) for one in several)


def sizes(segments: Sequence[Tensor]) -> tuple[int, ...]:
    """How many segments each map has."""
    return tuple(int(one.max()) + 1 for one in segments)


def _numbered(labels: Tensor) -> Tensor:
    return labels.unique(return_inverse=True)[1]
