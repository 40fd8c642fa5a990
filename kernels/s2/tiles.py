"""The tiles that S2-Attention runs in on the CPU: what neighbouring query blocks all see, and what each sees besides.

Local blocks slide along the sequence: they come first, and are read where they lie. Many queries on the same keys are a
product as fast as dense attention's, and their keys are gathered once: so the verticals of several query blocks are one
tile. What is left are verticals that not all of them see; the parts are joined by their log-sum-exp.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import torch
from torch import Tensor

from workbench.kernels.blocked import Group, Plan
from workbench.kernels.native.blocks import BlockLists
from workbench.kernels.s2.layout import S2Layout

_ROWS = (768, 384, 192)  # queries of a large tile: from 768 on PyTorch's kernel takes 256 at a time
_OFFSETS = 16  # first query blocks of the tiles that are tried
_GATHER = 64  # what it costs to gather a key, or to join both parts of a query, in queries multiplied with it, or keys


@lru_cache(maxsize=16)
def plan(layout: S2Layout) -> Plan:
    """The tiles of a layout: large ones first, then for each query block what these leave to it."""
    with torch.inference_mode(False):  # it is kept, also for calls whose gradients need it
        seen = layout.absolute_blocks()
        left = seen.clone()
        local = _local(layout, left)
        shared = _shared(layout, left, joins=bool(local))
        own = _alone(layout, left, joins=bool(local or shared))
        lists = BlockLists.of(seen, layout.block, layout.offset, layout.causal)
    n_layouts, n_rows, n_columns = seen.shape
    groups = (*local, *shared, *own)
    return Plan(n_layouts, layout.block, n_rows, n_columns, groups, layout.offset % layout.block, lists)


def _local(layout: S2Layout, left: Tensor) -> list[Group]:
    """The local blocks of query blocks that have as many as there can be, where queries are all keys; they are taken
    from `left`, [layout, I, J] bool.
    """
    count, (n_layouts, n_rows, _) = layout.local_sides[0], left.shape
    if not layout.causal or layout.offset or n_rows < count:
        return []
    rows = torch.arange(count - 1, n_rows)
    keys = rows[:, None] + torch.arange(1 - count, 1)
    left[:, rows[:, None], keys] = False
    mask = torch.ones(1, layout.block, count * layout.block, dtype=torch.bool).tril((count - 1) * layout.block)
    tiles = torch.arange(n_layouts).repeat_interleave(len(rows))
    return [Group(tiles, rows.repeat(n_layouts)[:, None], keys.repeat(n_layouts, 1), mask, sliding=True)]


def _shared(layout: S2Layout, left: Tensor, joins: bool) -> list[Group]:
    """Tiles of several query blocks; what they do is taken from `left`, [layout, I, J] bool."""
    n_rows = left.shape[1]
    whole = left.clone()  # what is seen without a mask
    if layout.causal:
        rows = torch.arange(n_rows)
        whole[:, rows, rows + layout.offset // layout.block] = False
    elif _filled(layout):
        whole[:, :, -1] = False
    found: dict[tuple[int, int], list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
    for at, (size, start, common) in enumerate(_best(whole, left, layout.block)):
        for tile, columns in enumerate(common):
            first, last = max(0, start + tile * size), min(n_rows, start + (tile + 1) * size)
            if bool(columns.any()):
                left[at, first:last] &= ~columns
                keys = columns.nonzero()[:, 0]
                found[last - first, len(keys)].append((at, torch.arange(first, last), keys))
    groups = []
    for tiles in found.values():
        layouts, queries, keys = zip(*tiles, strict=True)
        groups.append(Group(torch.tensor(layouts), torch.stack(queries), torch.stack(keys), joins=joins))
    return groups


def _best(whole: Tensor, left: Tensor, block: int) -> list[tuple[int, int, Tensor]]:
    """For each layout query blocks in a tile, the first one of the first tile, from −size + 1 to 0, and what all of a
    tile see, [tile, J]: what costs least.
    """
    n_rows, n_columns = whole.shape[1:]
    counts, more = left.sum((1, 2)), _GATHER / block
    nothing = whole.new_zeros(0, n_columns)
    best: list[tuple[float, int, int, Tensor]] = [(float((1 + more) * n), 1, 0, nothing) for n in counts]
    for size in dict.fromkeys(-(-rows // block) for rows in _ROWS):
        for before in range(0, size, -(-size // _OFFSETS)):
            behind = -(n_rows + before) % size
            padded = torch.nn.functional.pad(whole, (0, 0, before, behind), value=True).unflatten(1, (-1, size))
            common = padded.all(2)  # [layout, tile, J]
            rows = torch.full((common.shape[1],), size)
            rows[0] -= before
            rows[-1] -= behind
            keys = common.sum(-1)
            taken, joined = (keys * rows).sum(-1), (common.any(-1) * rows).sum(-1)
            costs = (keys * (rows + more)).sum(-1) + (1 + more) * (counts - taken) + more * joined
            for at, cost in enumerate(costs.tolist()):
                if cost < best[at][0]:
                    best[at] = cost, size, -before, common[at]
    return [(size, start, common) for _, size, start, common in best]


def _alone(layout: S2Layout, left: Tensor, joins: bool) -> list[Group]:
    """Tiles of one query block each, those with as many key blocks together."""
    block, n_rows = layout.block, left.shape[1]
    counts = left.sum(-1)
    # Zeros fill the last key block. Causal queries do not see them; others need a mask where they visit that block.
    filled = _filled(layout)
    if layout.causal:
        rows = torch.arange(n_rows)
        masked = left[:, rows, rows + layout.offset // block]
    else:
        masked = left[:, :, -1] & bool(filled)
    groups = []
    for count, mask_last in {(int(c), bool(m)) for c, m in zip(counts.flatten(), masked.flatten(), strict=True)}:
        if not count:
            continue
        at = ((counts == count) & (masked == mask_last)).nonzero()
        keys = left[at[:, 0], at[:, 1]].nonzero()[:, 1].view(len(at), count)
        mask = None
        if mask_last:  # the last listed block is the query's own, or the one that is filled up
            mask = torch.ones(1, block, count * block, dtype=torch.bool)
            if layout.causal:
                mask[..., -block:] = mask[..., -block:].tril()
            else:
                mask[..., -filled:] = False
        groups.append(Group(at[:, 0], at[:, 1:], keys, mask, joins))
    return groups


def _filled(layout: S2Layout) -> int:
    """Tokens that the last key block lacks."""
    return -layout.n_keys % layout.block
