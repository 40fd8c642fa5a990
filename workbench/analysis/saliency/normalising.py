"""How maps are made comparable: standardised per token, scaled to 0 … 1, and pooled to the encoder's positions."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import WorkbenchError

POOLINGS = ("max", "mean", "max_time", "max_frequency")


def standardised(maps: Tensor, valid: Tensor | None = None) -> Tensor:
    """(S − mean) / standard deviation of each token's map; a constant map becomes zeros.

    The deviation divides by n − 1, as SPES's code does. A map that varies by no more than float32 rounding is constant.

    Args:
        maps: [token, position...].
        valid: [token, position...] cells that count; the others become 0.

    >>> standardised(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])).tolist()
    [[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    flat = maps.flatten(1).double()
    counts = torch.ones_like(flat) if valid is None else valid.flatten(1).double()
    n = counts.sum(1, keepdim=True)
    mean = (flat * counts).sum(1, keepdim=True) / n.clamp(min=1)
    off = (flat - mean) * counts
    spread = (off.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    largest = (flat * counts).abs().amax(1, keepdim=True)
    varies = spread > 1e-7 * largest
    return torch.where(varies, off / spread.where(varies, 1.0), 0.0).to(maps.dtype).view(maps.shape)


def paired_min_max(
    maps: Tensor, token_maps: Tensor | None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Each token's input map and token map scaled together, so that the smallest cell of both is 0 and the largest 1.

    A constant pair becomes zeros.

    Args:
        maps: [token, position...]. token_maps: [token, token] or None.
        valid: cells of `token_maps` that count; the others become 0.
    """
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    if token_maps is not None:
        counts = torch.ones_like(token_maps, dtype=torch.bool) if valid is None else valid
        low = torch.minimum(low, token_maps.masked_fill(~counts, torch.inf).amin(1, keepdim=True))
        high = torch.maximum(high, token_maps.masked_fill(~counts, -torch.inf).amax(1, keepdim=True))
    width = high - low
    scale = torch.where(width > 0, width, 1.0)
    scaled = ((flat - low) / scale).view(maps.shape)
    if token_maps is None:
        return scaled, None
    return scaled, torch.where(counts, (token_maps - low) / scale, 0.0)


def pool(
    maps: Tensor, frames: int, *, length: int | None = None, out_length: int | None = None, how: str = "max"
) -> Tensor:
    """Input saliency [token, time, frequency] or [token, time] at the rate of the encoder's output, [token, frame].

    A frame takes the window of T / T' input frames that it stands for, over all frequencies: "max" is the largest cell
    and "mean" the mean (the paper's two-dimensional poolings), "max_time" the mean over frequency of the largest over
    the window, "max_frequency" the mean over the window of the largest over frequency.

    Args:
        maps: the first positions of the input. frames: the encoder positions that stand for them.
        length, out_length: T and T', of the model's whole input and output; those of `maps` and `frames` if None.
        how: one of the above.

    Raises:
        WorkbenchError: T' does not divide T, or an unknown pooling.

    >>> pool(torch.tensor([[0.0, 1.0, 5.0, 2.0]]), 2).tolist()
    [[1.0, 5.0]]
    """
    if how not in POOLINGS:
        raise WorkbenchError(f"pooling is one of {', '.join(POOLINGS)}, not {how!r}")
    whole, out = length or maps.shape[1], out_length or frames
    if whole % out:
        raise WorkbenchError(
            f"{out} encoder positions do not divide {whole} input frames",
            shape=maps.shape,
            hint=f"pad the input to a multiple of the encoder's stride, such as {-(-whole // out) * out} frames",
        )
    size = whole // out
    cells = maps[..., None] if maps.dim() == 2 else maps
    lacking = frames * size - cells.shape[1]
    if not 0 <= lacking < size:
        raise WorkbenchError(f"{cells.shape[1]} input frames are not {frames} windows of {size}", shape=maps.shape)
    nothing = cells.new_full((cells.shape[0], lacking, cells.shape[2]), torch.nan)
    windows = torch.cat([cells, nothing], 1).unflatten(1, (frames, size))
    largest = windows.nan_to_num(-torch.inf)
    if how == "max":
        return largest.amax((2, 3))
    if how == "mean":
        return windows.nanmean((2, 3))
    if how == "max_time":
        return largest.amax(2).mean(2)
    return windows.amax(3).nanmean(2)


def spread_out(maps: Tensor, positions: tuple[int, ...], size: int) -> Tensor:
    """Maps of encoder frames [token, frame] over input cells [token, time, (frequency)]: each frame repeated.

    >>> spread_out(torch.tensor([[1.0, 2.0]]), (3,), 2).tolist()
    [[1.0, 1.0, 2.0]]
    """
    wide = maps.repeat_interleave(size, 1)[:, : positions[0]]
    return wide if len(positions) == 1 else wide[..., None].expand(*wide.shape, positions[1])
