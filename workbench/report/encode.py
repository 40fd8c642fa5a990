"""Patterns as bytes: quantised to 8 bits, pooled, packed as triangles, and written into JSON that HTML cannot misread.

Byte 0 is a key that the query may not see; byte b > 0 is the weight ((b − 1) / 254)². The square root spends the levels
where attention weights are: most of them are small.
"""

from __future__ import annotations

import base64
import math

import numpy as np
from numpy.typing import NDArray

LEVELS = 254

Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


def quantise(weights: Floats, seen: Bools | None = None) -> tuple[Bytes, float]:
    """Bytes [head, row, column] of weights in [0, 1], and the largest absolute error that they make.

    Args:
        seen: [head or 1, row, column], which cells the query may see; None where it is not known: then a cell to which
            no head gives any weight at all counts as one that it may not.
    """
    if seen is None:
        seen = np.asarray((weights > 0).any(axis=0))
    levels = np.rint(np.sqrt(np.clip(weights, 0.0, 1.0)) * LEVELS).astype(np.uint8)
    coded = np.where(seen, levels + np.uint8(1), np.uint8(0)).astype(np.uint8)
    error = float(np.abs(dequantise(coded) - weights).max()) if weights.size else 0.0
    return coded, error


def dequantise(coded: Bytes) -> Floats:
    """The weights that the bytes stand for; 0 where a key may not be seen."""
    levels = np.maximum(coded.astype(np.float32) - 1.0, 0.0)
    return np.square(levels / LEVELS).astype(np.float32)


def pool(coded: Bytes) -> Bytes:
    """Bytes [head, row, column] with the largest of each 2 x 2 block: the same as quantising the pooled weights."""
    heads, rows, columns = coded.shape
    padded = np.zeros((heads, rows + rows % 2, columns + columns % 2), dtype=np.uint8)
    padded[:, :rows, :columns] = coded
    blocks = padded.reshape(heads, padded.shape[1] // 2, 2, padded.shape[2] // 2, 2)
    return np.asarray(blocks.max(axis=(2, 4)), dtype=np.uint8)


def row_lengths(rows: int, columns: int, *, packed: bool) -> list[int]:
    """How many bytes each row keeps: all columns, or those up to the diagonal when the map is packed.

    The last row of a packed map sees the last column, as with a key-value cache.
    """
    return [row + 1 + columns - rows if packed else columns for row in range(rows)]


def pack(coded: Bytes) -> tuple[bytes, bool]:
    """All heads one after another, row by row; causal maps lose the cells above the diagonal. Also whether they did."""
    _, rows, columns = coded.shape
    packed = columns >= rows > 1 and not np.triu(coded.max(axis=0), k=1 + columns - rows).any()
    if not packed:
        return coded.tobytes(), False
    keep = np.tri(rows, columns, columns - rows, dtype=bool)
    return coded[:, keep].tobytes(), True


def packed_size(coded: Bytes) -> int:
    """Characters that `pack` and base64 make of the map."""
    heads, rows, columns = coded.shape
    packed = columns >= rows > 1 and not np.triu(coded.max(axis=0), k=1 + columns - rows).any()
    return base64_size(heads * sum(row_lengths(rows, columns, packed=packed)))


def base64_size(n_bytes: int) -> int:
    """Characters of base64 for so many bytes."""
    return 4 * math.ceil(n_bytes / 3)


def text64(data: bytes) -> str:
    """Base64 in ASCII."""
    return base64.b64encode(data).decode("ascii")
