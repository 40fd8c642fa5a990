"""Tiles for FlexAttention by head width and dtype, so that its kernels fit the shared memory of the device.

PyTorch's own choice knows widths of 64, 128 and 256; what it takes for others can exceed the memory: the launch fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

_AMD_BYTES = 65_536
_SPARE = 2048  # for what rows hold, and for sums across warps
_REGISTERS = 144  # of the 255 that a thread has: for the output and the scores


@dataclass(frozen=True)
class Tile:
    """What one program takes at once: so many queries and keys, and how many tiles of a loop are loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = (
    Tile(128, 128, 4, 3), Tile(128, 128, 8, 3), Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2),
    Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(64, 32, 4, 1),
    Tile(32, 64, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1),
)  # fmt: skip
"""Largest first."""
BACKWARD = (
    Tile(64, 128, 8, 3), Tile(64, 128, 8, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1),
    Tile(32, 64, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1),
)  # fmt: skip
"""Largest first: queries of the loop and keys that stay, and in the pass for queries the other way round."""


def forward_bytes(tile: Tile, d: int, width: int, itemsize: int, amd: bool = False) -> int:
    """Shared memory that the forward needs at most: queries, keys and values of each stage, and the weights.

    >>> forward_bytes(Tile(64, 64, 4, 2), 128, 128, 2) // 1024
    90
    """
    d, width = _padded(d), _padded(width)
    return itemsize * (_held(tile, tile.queries * d, tile.keys * (d + width), amd) + tile.queries * tile.keys) + _SPARE


def backward_bytes(tile: Tile, d: int, width: int, itemsize: int, amd: bool = False) -> int:
    """The same of the backward: keys and values that stay, queries and gradients of each stage, weights twice."""
    both = _padded(d) + _padded(width)
    held = _held(tile, tile.keys * both, tile.queries * both, amd)
    return itemsize * (held + 2 * tile.queries * tile.keys) + _SPARE


def forward_tile(d: int, width: int, itemsize: int, limit: int, amd: bool = False, most_keys: int = 128) -> Tile:
    """The largest tile of the forward that fits `limit` bytes and key blocks, and whose sums fit the registers."""
    for tile in FORWARD:
        if tile.keys > most_keys:
            continue
        held = tile.queries * (_padded(width) + tile.keys) / (32 * tile.warps)
        if forward_bytes(tile, d, width, itemsize, amd) <= limit and held <= _REGISTERS:
            return tile
    return FORWARD[-1]


def backward_tile(d: int, width: int, itemsize: int, limit: int, amd: bool = False, most_keys: int = 128) -> Tile:
    """The same of the backward; float32 products run on the vector units, where PyTorch too takes small tiles."""
    for tile in BACKWARD if itemsize < 4 else BACKWARD[-2:]:
        if tile.keys > most_keys:
            continue
        held = tile.keys * (_padded(d) + _padded(width)) / (32 * tile.warps)
        if backward_bytes(tile, d, width, itemsize, amd) <= limit and held <= _REGISTERS:
            return tile
    return BACKWARD[-1]


def kernel_options(
    d: int, width: int, dtype: torch.dtype, device: torch.device, most_keys: int = 128
) -> dict[str, Any]:
    """FlexAttention's `kernel_options` for heads `d` wide, values `width` wide and key blocks of `most_keys`."""
    return dict(_options(d, width, dtype.itemsize, shared_bytes(device), torch.version.hip is not None, most_keys))


@lru_cache(maxsize=64)
def _options(d: int, width: int, itemsize: int, limit: int, amd: bool, most_keys: int = 128) -> dict[str, Any]:
    ahead, back = (choice(d, width, itemsize, limit, amd, most_keys) for choice in (forward_tile, backward_tile))
    return {
        "fwd_BLOCK_M": ahead.queries, "fwd_BLOCK_N": ahead.keys,
        "fwd_num_warps": ahead.warps, "fwd_num_stages": ahead.stages,
        "bwd_BLOCK_M1": back.queries, "bwd_BLOCK_N1": back.keys,
        "bwd_BLOCK_M2": back.keys, "bwd_BLOCK_N2": back.queries,
        "bwd_num_warps": back.warps, "bwd_num_stages": back.stages,
        "FORCE_USE_FLEX_ATTENTION": True,  # the kernel for few queries takes other tiles
    }  # fmt: skip


def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have on a device."""
    if torch.version.hip is not None:
        return _AMD_BYTES
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _held(tile: Tile, stay: int, loaded: int, amd: bool) -> int:
    """Numbers in shared memory: what stays, and what each stage of the loop loads.

    On AMD one stage waits in registers, and with no other what stays is there too, once it has been read.
    """
    if amd:
        return max(stay, loaded) if tile.stages == 1 else stay + (tile.stages - 1) * loaded
    return stay + tile.stages * loaded
