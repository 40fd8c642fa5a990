"""An S2 layout for FlexAttention: each kv head's verticals together, so that whole blocks of 128 keys are seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.kernels.flex import BLOCK, FlexPlan, block_mask
from workbench.kernels.s2.layout import S2Layout

_NUMBERS = 1 << 25  # of [layout, run of queries, run of keys] held at once
_NEVER = 1 << 30  # a position after every query


@lru_cache(maxsize=16)
def flex_plan(layout: S2Layout, device: torch.device) -> FlexPlan:
    """The plan of a layout: its keys as they lie, or with verticals first, whichever visits fewer blocks."""
    as_they_lie = torch.arange(layout.n_keys).expand(layout.n_layouts, -1)
    orders = [as_they_lie, _verticals_first(layout)] if layout.causal else [as_they_lie]
    blocks = [_blocks(layout, keys) for keys in orders]
    best = min(range(len(orders)), key=lambda i: int(blocks[i][0].sum()))
    keys, (seen, whole) = orders[best], blocks[best]
    heads = layout.for_heads(slice(None), layout.n_heads)
    seen, whole = (blocks.to(device)[heads.to(device)] for blocks in (seen, whole))
    mask = block_mask(seen, whole, _mask_mod(layout, keys, device), (layout.n_queries, keys.shape[1]))
    return FlexPlan(mask, None, keys if best else None, None).to(device)


def _verticals_first(layout: S2Layout) -> Tensor:
    """[layout, place] keys: blocks that every later query sees, filled up to blocks of 128 with −1, then the others."""
    keys = torch.arange(layout.n_keys)
    blocks = torch.arange(-(-layout.n_keys // layout.block))
    beyond = blocks[-1:] + len(blocks) + layout.local_sides[0]  # a query to which no key is local
    vertical = layout.sees(torch.arange(layout.n_layouts)[:, None], beyond, blocks).expand(layout.n_layouts, -1)
    orders = []
    for each in vertical[:, keys // layout.block]:
        first = keys[each]
        orders.append(torch.cat((F.pad(first, (0, -len(first) % BLOCK), value=-1), keys[~each])))
    longest = max(map(len, orders))
    return torch.stack([F.pad(order, (0, longest - len(order)), value=-1) for order in orders])


def _blocks(layout: S2Layout, keys: Tensor) -> tuple[Tensor, Tensor]:
    """[layout, query block, key block] bool: blocks of 128 that are seen in part or whole, and those seen whole."""
    n_layouts, edge = layout.n_layouts, math.gcd(layout.block, BLOCK)
    run = math.gcd(layout.offset, edge) if layout.offset else edge  # queries that share a block of the layout
    runs_of_keys = F.pad(keys, (0, -keys.shape[1] % BLOCK), value=-1).unflatten(1, (-1, edge))
    full_run = (runs_of_keys >= 0).all(-1)
    first_key = runs_of_keys.masked_fill(runs_of_keys < 0, _NEVER).amin(-1)
    last_key = runs_of_keys.amax(-1)
    n_rows = -(-layout.n_queries // BLOCK)
    seen = torch.zeros(n_layouts, n_rows, runs_of_keys.shape[1] * edge // BLOCK, dtype=torch.bool)
    whole = torch.zeros_like(seen)
    which = torch.arange(n_layouts)[:, None, None]
    at_once = max(1, _NUMBERS // (runs_of_keys.shape[1] * n_layouts * (BLOCK // run)))
    for start in range(0, n_rows, at_once):
        rows = slice(start, min(start + at_once, n_rows))
        first = torch.arange(rows.start * BLOCK, rows.stop * BLOCK, run)
        real = first < layout.n_queries
        last = (first + run).clamp(max=layout.n_queries) - 1 + layout.offset
        first = (first + layout.offset).clamp(max=layout.n_keys - 1)
        at_key = first_key[:, None].clamp(max=layout.n_keys - 1)
        sees = layout.sees(which, first[:, None] // layout.block, at_key // layout.block)
        some = sees & (first_key < _NEVER)[:, None] & real[:, None]
        every = sees & full_run[:, None]
        if layout.causal:
            some = some & (last[:, None] >= first_key[:, None])
            every = every & (first[:, None] >= last_key[:, None])
        every = every | ~real[:, None]
        some, every = (x.unflatten(2, (-1, BLOCK // edge)).unflatten(1, (-1, BLOCK // run)) for x in (some, every))
        seen[:, rows], whole[:, rows] = some.any(-1).any(2), every.all(-1).all(2)
    return seen, whole & seen


def _mask_mod(layout: S2Layout, keys: Tensor, device: torch.device) -> Callable[..., Tensor]:
    """The rule, from tables: which layout a head has, which block and position a query and a key."""
    position = torch.arange(layout.n_queries) + layout.offset
    never = torch.full_like(keys, _NEVER)
    key_position = torch.where(keys < 0, never, keys if layout.causal else torch.zeros_like(keys))
    tables = (
        layout.for_heads(slice(None), layout.n_heads),
        position // layout.block - layout.offset // layout.block,
        position if layout.causal else torch.zeros_like(position),
        keys.clamp(min=0) // layout.block,
        key_position,
    )
    head_layout, query_block, query_at, key_block, key_at = (x.to(device, torch.int32) for x in tables)
    visible = layout.absolute_blocks().contiguous().to(device)

    def seen(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        which = head_layout[h]
        laid_out = visible[which, query_block[q_idx], key_block[which, kv_idx]]
        return laid_out & (query_at[q_idx] >= key_at[which, kv_idx])

    return seen
