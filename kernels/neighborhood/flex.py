"""Neighborhoods for FlexAttention: tokens in boxes, each a block of 128, so that few blocks meet, most as a whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.kernels.flex import BLOCK, FlexPlan, block_mask
from workbench.kernels.neighborhood.axis import Axis
from workbench.kernels.neighborhood.layout import NeighborhoodLayout, flat_tiles

_PARTIAL = 0.2  # what computing a mask adds to a block's products
_MOST_TILES = 2048  # in one dimension, of boxes that are tried: every pair of them is looked at
_HIDDEN = -1


@lru_cache(maxsize=16)
def flex_plan(layout: NeighborhoodLayout, n_heads: int, device: torch.device) -> FlexPlan:
    """The plan of a row-major layout: each box of `best_box` fills a block of 128 places, padded if it is smaller."""
    box = best_box(layout)
    tokens = flat_tiles([axis.tiles(size) for axis, size in zip(layout.axes, box, strict=True)], layout.shape)
    queries = F.pad(tokens, (0, BLOCK - tokens.shape[1]), value=-1).flatten()
    keys = torch.cat((queries, torch.arange(layout.n_tokens, layout.n_keys)))
    seen, whole = _blocks(layout, box)
    mask_mod = _mask_mod(layout, queries, keys, device)
    heads = (n_heads, -1, -1)
    seen, whole = (blocks.to(device).expand(heads) for blocks in (seen, whole))
    mask = block_mask(seen, whole, mask_mod, (len(queries), len(keys)))
    places = torch.empty(layout.n_tokens, dtype=torch.long)
    real = (queries >= 0).nonzero()[:, 0]
    places[queries[real]] = real
    return FlexPlan(mask, queries, keys[None], places).to(device)


def best_box(layout: NeighborhoodLayout) -> tuple[int, ...]:
    """Positions of a box in each dimension, at most 128 in all: those with the least work in blocks and masks.

    >>> best_box(NeighborhoodLayout((64, 64), 16, 16))
    (8, 16)
    """
    sizes = [_candidates(axis) for axis in layout.axes]
    best: tuple[float, tuple[int, ...]] | None = None
    for choice in itertools.product(*sizes):
        volume = math.prod(size for size, *_ in choice)
        if volume > BLOCK:
            continue
        boxes, seen, whole = (math.prod(each[i] for each in choice) for i in (1, 2, 3))
        extra = boxes * -(-layout.extra_keys // BLOCK)
        work = (seen + extra) * (1 + _PARTIAL) - (whole * _PARTIAL if volume == BLOCK else 0)
        box = tuple(size for size, *_ in choice)
        if best is None or (work, -volume, box) < (best[0], -math.prod(best[1]), best[1]):
            best = work, box
    assert best is not None  # boxes of one token are always there
    return best[1]


def _candidates(axis: Axis) -> list[tuple[int, int, int, int]]:
    """Sizes of a box in one dimension, with the number of boxes, and of pairs that meet in part and as a whole."""
    longest = -(-axis.length // axis.dilation)
    largest = min(longest, BLOCK)
    found = []
    for size in range(1, largest + 1):
        useful = size <= 16 or size & (size - 1) == 0 or size % axis.stride == 0 or longest % size == 0
        if size != largest and (not useful or axis.length > _MOST_TILES * size):
            continue
        some, every = axis.meets(size)
        found.append((size, len(some), int(some.sum()), int(every.sum())))
    return found


def _blocks(layout: NeighborhoodLayout, box: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[1, box, box and blocks of extra keys] bool: blocks that are seen in part or whole, and only whole."""
    meets = [axis.meets(size) for axis, size in zip(layout.axes, box, strict=True)]
    seen, whole = (reduce(_product, [each[i] for each in meets]) for i in (0, 1))
    if math.prod(box) < BLOCK:
        whole = torch.zeros_like(whole)  # padding is hidden
    extra = torch.arange(-(-layout.extra_keys // BLOCK))
    full = ((extra + 1) * BLOCK <= layout.extra_keys).expand(len(seen), -1)
    return torch.cat((seen, torch.ones_like(full)), 1)[None], torch.cat((whole, full), 1)[None]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[q1 · q2, k1 · k2] of [q1, k1] and [q2, k2] bool."""
    return (a[:, None, :, None] & b[None, :, None, :]).flatten(2).flatten(0, 1)


def _mask_mod(layout: NeighborhoodLayout, queries: Tensor, keys: Tensor, device: torch.device) -> Callable[..., Tensor]:
    """The rule, from tables: in three dimensions, the first and last position that a query sees, and a key's own.

    Positions of one dilation class follow each other, so that an interval of them tells the classes apart too. A key
    after the tokens lies everywhere, padding nowhere.
    """
    low, high, at = [], [], []
    tokens = keys.clamp(min=0, max=layout.n_tokens - 1)
    for axis, x, y in zip(
        layout.axes, layout.coordinates(queries.clamp(min=0)), layout.coordinates(tokens), strict=True
    ):
        first, last = axis.bounds(x)
        start = x % axis.dilation * axis.length
        low.append(first + start)
        high.append(last + start)
        at.append((y // axis.dilation + y % axis.dilation * axis.length).masked_fill(keys < 0, _HIDDEN))
    for _ in range(3 - len(layout.axes)):
        low.append(torch.zeros_like(queries))
        high.append(torch.zeros_like(queries))
        at.append(torch.zeros_like(keys))
    first, last, own = (torch.stack(each).to(device, torch.int32) for each in (low, high, at))
    everywhere = (keys >= layout.n_tokens).to(device)

    def seen(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        inside = everywhere[kv_idx]
        x, y, z = own[0, kv_idx], own[1, kv_idx], own[2, kv_idx]
        near = (first[0, q_idx] <= x) & (x <= last[0, q_idx])
        near = near & (first[1, q_idx] <= y) & (y <= last[1, q_idx])
        near = near & (first[2, q_idx] <= z) & (z <= last[2, q_idx])
        return near | inside

    return seen
