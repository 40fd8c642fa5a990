"""What the kernels read instead of a mask: lists of tiles, bits of a block-sparse layout, one key per query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.layouts import Layout, listed
from workbench.kernels.mask_summary import MaskSummary
from workbench.kernels.masks import Mask

WORD_BITS = 32


@dataclass(frozen=True)
class Tables:
    """A block-sparse layout for kernels with tiles of BM queries and BN keys; layouts come first in every shape.

    Attributes:
        words: [layout, query block, key tile] int32; bit b says whether the block of queries sees the b-th layout block
            in the tile of keys. A tile within one block has one bit.
        key_tiles, n_key_tiles: [layout, query tile, key tile] int32, the tiles to visit in order, and how many.
        query_tiles, n_query_tiles: [layout, key tile, query tile] int32, the same from the side of the keys.
        block: edge of a layout block.
    """

    words: Tensor
    key_tiles: Tensor
    n_key_tiles: Tensor
    query_tiles: Tensor
    n_query_tiles: Tensor
    block: int

    @classmethod
    def of(cls, mask: Mask, rows: int, keys: int, device: torch.device) -> Tables:
        """The tables of a mask with a layout, for tiles of `rows` queries and `keys` keys (powers of two)."""
        assert mask.layout is not None
        block = mask.layout.block
        blocks = mask.layout.blocks().to(device)
        words = _words(blocks, block, keys, -(-mask.n_keys // keys))
        first_row = torch.arange(-(-mask.n_queries // rows), device=device) * rows
        last_row = (first_row + rows).clamp(max=mask.n_queries) - 1
        used = _any_within(words != 0, first_row // block, last_row // block)
        used &= _within_rules(mask, first_row, last_row, keys)
        return cls(words, *listed(used), *listed(used.transpose(1, 2)), block)


def _words(blocks: Tensor, block: int, keys: int, n_tiles: int) -> Tensor:
    """[layout, query block, key block] bool to [layout, query block, key tile] int32 words."""
    if block >= keys:
        tile = torch.arange(n_tiles, device=blocks.device) * keys // block
        return blocks[:, :, tile].to(torch.int32)
    each = keys // block
    padded = torch.nn.functional.pad(blocks, (0, n_tiles * each - blocks.shape[2]))
    bits = torch.arange(each, device=blocks.device)
    words = (padded.unflatten(2, (n_tiles, each)).long() << bits).sum(-1)
    return torch.where(words >= 1 << (WORD_BITS - 1), words - (1 << WORD_BITS), words).to(torch.int32)


def _any_within(used: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """[layout, row of blocks, tile] bool to [layout, query tile, tile]: whether any block row first to last has it."""
    before = torch.nn.functional.pad(used.to(torch.int32).cumsum(1, dtype=torch.int32), (0, 0, 1, 0))
    return before[:, last + 1] > before[:, first]


def _within_rules(mask: Mask, first_row: Tensor, last_row: Tensor, keys: int) -> Tensor:
    """[query tile, key tile] bool: whether the positional rules let the tile hold anything."""
    left = torch.arange(0, mask.n_keys, keys, device=first_row.device)[None, :]
    low, high = first_row[:, None] + mask.offset, last_row[:, None] + mask.offset
    within = torch.ones(len(first_row), left.shape[1], dtype=torch.bool, device=first_row.device)
    if mask.causal:
        within &= left <= high
    if mask.window is not None:
        within &= (left + keys - 1 > low - mask.window) & (left < high + mask.window)
    return within


MOST_CELLS = 1 << 28  # of a table with a byte for each query and key


def has_words(layout: Layout) -> bool:
    """Whether its blocks divide the kernels' tiles, or tiles them, so that `Tables` can be made of it."""
    return layout.block >= 8 and layout.block & (layout.block - 1) == 0


def is_said_by_words(layout: Layout) -> bool:
    """Whether that says all: nothing is hidden within a block."""
    return has_words(layout) and layout.exact


def cells_of(mask: Mask) -> int:
    """How many numbers `tokens_of` has."""
    layouts = 1 if mask.layout is None or mask.layout.n_layouts == 1 else mask.n_heads
    return layouts * mask.n_queries * mask.n_keys


def tokens_of(mask: Mask, device: torch.device) -> Tensor:
    """[1, head or 1, query, key] bool: what a layout shows, token by token."""
    assert mask.layout is not None
    layouts = torch.arange(mask.layout.n_layouts)
    shown = mask.layout.visible(slice(0, mask.n_queries), slice(0, mask.n_keys), layouts).to(device)
    each = 1 if len(layouts) == 1 else mask.n_heads // len(layouts)
    return shown.repeat_interleave(each, dim=0)[None].contiguous()


def parts(names: Sequence[str], sink_keys: Sequence[int] | None, n_keys: int) -> dict[str, list[int]]:
    """Which of the `targets` make up each name: several where sinks are a given set of keys."""
    found, at = dict[str, list[int]](), 0
    for name in names:
        n = len(_given(sink_keys, n_keys)) if name == "sink" and sink_keys is not None else 1
        found[name] = list(range(at, at + n))
        at += n
    return found


def targets(
    names: Sequence[str], sink_keys: Sequence[int] | None, mask: Mask, seen: MaskSummary, device: torch.device
) -> Tensor:
    """[target, batch or 1, head or 1, query] int32: the key whose weight is asked for in each row, or -1.

    Args:
        names: of `sink`, `current`, `previous`. sink_keys: the sinks; None for the first key that a row sees.
    """
    if not names:
        return torch.empty(0, 1, 1, mask.n_queries, dtype=torch.int32, device=device)
    position = torch.arange(mask.n_queries, device=device) + mask.offset
    found = []
    for name in names:
        if name == "sink" and sink_keys is None:
            found.append(torch.where(seen.keys_per_query > 0, seen.first_key, -1))
        elif name == "sink":
            found.extend(_if_shown(torch.full_like(position, key), position, mask)
                         for key in _given(sink_keys, mask.n_keys))  # fmt: skip
        else:
            found.append(_if_shown(position - {"current": 0, "previous": 1}[name], position, mask))
    batches, heads = (max(key.shape[axis] for key in found) for axis in (0, 1))
    return torch.stack([key.expand(batches, heads, -1) for key in found]).to(torch.int32).contiguous()


def _given(sink_keys: Sequence[int] | None, n_keys: int) -> list[int]:
    """Each of the given keys once, counted from the first."""
    return sorted({key % n_keys for key in sink_keys or ()})


def _if_shown(key: Tensor, position: Tensor, mask: Mask) -> Tensor:
    """[1, head or 1, query]: a key for each row, or -1 where the rules hide it; the mask's tensor the kernel asks."""
    shown = (key >= 0) & (key < mask.n_keys)
    if mask.causal:
        shown = shown & (key <= position)
    if mask.window is not None:
        shown = shown & ((position - key).abs() < mask.window)
    shown = shown[None, None]
    if mask.layout is not None:
        block = mask.layout.block
        row = torch.arange(mask.n_queries, device=key.device) // block
        listed = mask.layout.blocks().to(key.device)[:, row, key.clamp(0, mask.n_keys - 1) // block]
        shown = shown & listed.repeat_interleave(mask.n_heads // mask.layout.n_layouts, dim=0)
    return torch.where(shown, key, -1)
