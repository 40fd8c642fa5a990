"""Neighborhoods for FlexAttention: tokens in blocks, arranged so that few of these meet, most as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from workbench.kernels.flex import BLOCK, FlexPlan, block_mask
from workbench.kernels.neighborhood.boxes import arrange
from workbench.kernels.neighborhood.fewest import fewest_blocks
from workbench.kernels.neighborhood.layout import NeighborhoodLayout

_HIDDEN = -1


@lru_cache(maxsize=16)
def flex_plan(layout: NeighborhoodLayout, n_heads: int, device: torch.device) -> FlexPlan:
    """The plan of a row-major layout: blocks as `arrange` fills them, then those of the extra keys.

    >>> flex_plan(NeighborhoodLayout((64, 64), 16, 16), 1, torch.device("cpu"))
    FlexPlan(64 pairs of blocks of 128 visited; no order of tokens needs fewer than 64)
    """
    found = arrange(layout)
    queries = found.queries.flatten()
    keys = torch.cat((found.keys.flatten(), torch.arange(layout.n_tokens, layout.n_keys)))
    key_block = found.keys.shape[1]
    extra = torch.arange(-(-layout.extra_keys // key_block))
    some = (found.queries >= 0).any(1, keepdim=True).expand(-1, len(extra))
    full = some & ((extra + 1) * key_block <= layout.extra_keys)
    seen, whole = torch.cat((found.seen, some), 1), torch.cat((found.whole, full), 1)
    seen, whole = (blocks[None].to(device).expand(n_heads, -1, -1) for blocks in (seen, whole))
    lengths = len(queries), len(keys)
    mask = block_mask(seen, whole, _mask_mod(layout, queries, keys, device), lengths, key_block)
    places = torch.empty(layout.n_tokens, dtype=torch.long)
    real = (queries >= 0).nonzero()[:, 0]
    places[queries[real]] = real
    fewest = n_heads * fewest_blocks(layout, BLOCK, key_block)
    return FlexPlan(mask, queries, keys[None], places, fewest).to(device)


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
