"""A pattern as small numbers for a page: blocks of tokens that keep every peak, and exact largest weights.

Byte 0 of a cell is a place that no query of the block may see; byte b > 0 is the weight ((b − 1) / 254)². The square
root spends the levels where attention weights are: most of them are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.errors import ReportError
from workbench.kernels.patterns import Pattern

LEVELS = 254
MOST_BLOCK = 256  # so that a place in a block fits into two bytes
_STRIP_CELLS = 1 << 23

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Pyramid:
    """Some heads of one batch entry of a pattern, in blocks of `block` x `block` tokens.

    Attributes:
        cells: [head, row, column] bytes of the largest weight in each block.
        places: [head, row, column] where in the block it is, query · block + key; None when blocks are single cells.
        error: largest absolute error of a byte.
        top_keys, top: [head, query, n] the largest weights of each row, exact; key −1 and NaN fill up short rows.
        first: [head, query] weight on the first key that the query sees; NaN where it sees none.
        first_key: the first key that any query sees.
        exact: [head, query, key] weights, NaN where hidden, if they were asked for.
    """

    cells: Bytes
    places: NDArray[np.uint16] | None
    block: int
    error: float
    top_keys: NDArray[np.int32]
    top: NDArray[np.float32]
    first: NDArray[np.float32]
    first_key: int
    exact: NDArray[np.float32] | None


def quantise(weights: NDArray[Any]) -> Bytes:
    """Bytes of weights from 0 to 1; NaN, a hidden place, gives 0.

    >>> quantise(np.array([np.nan, 0.0, 0.25, 1.0])).tolist()
    [0, 1, 128, 255]
    """
    levels = np.rint(np.sqrt(np.clip(np.nan_to_num(weights), 0.0, 1.0)) * LEVELS).astype(np.uint8)
    return np.where(np.isnan(weights), np.uint8(0), levels + np.uint8(1)).astype(np.uint8)


def dequantise(cells: Bytes) -> NDArray[np.float32]:
    """The weights that bytes stand for; 0 for a hidden place."""
    return np.square(np.maximum(cells.astype(np.float32) - 1.0, 0.0) / LEVELS).astype(np.float32)


def least(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The least that weights in bytes may have been: of the largest one it makes no scale go further than they do.

    >>> bool(dequantise(quantise(np.array([0.6], np.float32))) > 0.6), bool(least(dequantise(np.uint8([198]))) < 0.6)
    (True, True)
    """
    return np.square(np.maximum(np.sqrt(weights) - 0.5 / LEVELS, 0.0))


def build(
    pattern: Pattern, heads: Sequence[int], batch: int, *, block: int = 1, n_top: int = 8, exact: bool = False
) -> Pyramid:
    """Stream some heads of a batch entry; at no time are more than a strip of rows held.

    A signed or unnormalised pattern is shown as |A| / Σ|A| per row.

    Raises:
        ReportError: weights outside of [0, 1], or NaN.
    """
    if pattern.by_magnitude:
        pattern = pattern.magnitude()
    _, _, queries, keys = pattern.shape
    n_top = min(n_top, keys)
    rows, columns = -(-queries // block), -(-keys // block)
    cells = np.zeros((len(heads), rows, columns), np.uint8)
    places = np.zeros(cells.shape, np.uint16) if block > 1 else None
    top_keys = np.full((len(heads), queries, n_top), -1, np.int32)
    top = np.full((len(heads), queries, n_top), np.nan, np.float32)
    first = np.full((len(heads), queries), np.nan, np.float32)
    kept = np.full((len(heads), queries, keys), np.nan, np.float32) if exact else None
    first_key, error = keys, 0.0
    step = max(block, _STRIP_CELLS // max(1, keys) // block * block)
    for at, head in enumerate(heads):
        for start in range(0, queries, step):
            strip = slice(start, min(start + step, queries))
            # Keys beyond those that any of these queries sees, half of a causal map, are not computed.
            end = max(min(n_top, keys), pattern.mask.key_range(strip)[1])
            weights = strip_of(pattern, batch, head, strip, slice(0, end))
            _fill_rows(weights, top_keys[at, strip], top[at, strip], first[at, strip])
            seen = torch.isfinite(weights)
            if bool(seen.any()):
                first_key = min(first_key, int(seen.any(0).int().argmax()))
            pooled, place = _pool(weights, block)
            found = pooled.numpy()
            where = slice(start // block, start // block + found.shape[0]), slice(0, found.shape[1])
            cells[at][where] = quantise(found)
            if places is not None:
                places[at][where] = place.numpy().astype(np.uint16)
            if kept is not None:
                kept[at, strip, :end] = weights.numpy()
            shown = dequantise(cells[at][where])
            error = max(error, float(np.nanmax(np.abs(shown - found), initial=0.0)))
    first_key = first_key if first_key < keys else 0
    return Pyramid(cells, places, block, error, top_keys, top, first, first_key, kept)


def strip_of(pattern: Pattern, batch: int, head: int, queries: slice, keys: slice) -> Tensor:
    """[query, key] weights of a head, float32, NaN where a query may not see a key.

    Raises:
        ReportError: weights outside of [0, 1], or NaN.
    """
    entry = slice(batch, batch + 1)
    weights = pattern.tile_of(entry, queries, keys, [head])[0, 0].detach().float().cpu()
    if weights.numel() and not (float(weights.min()) >= 0 and float(weights.max()) <= 1 + 1e-3):
        raise ReportError(
            f"the weights run from {float(weights.min()):.3g} to {float(weights.max()):.3g}, and a view shows 0 to 1",
            hint="NaN in the pattern comes from the model; other weights must be normalised per row",
        )
    visible = pattern.mask.visible(queries, keys, entry, slice(head, head + 1))
    if visible is None:
        return weights
    return weights.masked_fill(~visible.expand(1, 1, *weights.shape)[0, 0].cpu(), torch.nan)


def _fill_rows(weights: Tensor, keys: NDArray[Any], top: NDArray[Any], first: NDArray[Any]) -> None:
    """The largest weights of each row, and the weight on its first visible key."""
    seen = torch.isfinite(weights)
    value, key = weights.masked_fill(~seen, -1.0).topk(keys.shape[1], dim=-1)
    there = value >= 0
    keys[:] = key.masked_fill(~there, -1).numpy()
    top[:] = value.masked_fill(~there, torch.nan).numpy()
    if weights.shape[1]:
        leading = seen.int().argmax(dim=-1, keepdim=True)
        first[:] = weights.gather(1, leading)[:, 0].numpy()


def _pool(weights: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """[row, column] the largest visible weight of each block, NaN where there is none, and its place in the block."""
    if block == 1:
        return weights, torch.zeros(0)
    queries, keys = weights.shape
    padded = torch.full((-(-queries // block) * block, -(-keys // block) * block), -1.0)
    padded[:queries, :keys] = weights.nan_to_num(-1.0)
    blocks = padded.unfold(0, block, block).unfold(1, block, block).flatten(2)
    largest, place = blocks.max(dim=-1)
    return largest.masked_fill(largest < 0, torch.nan), place
