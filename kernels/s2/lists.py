"""What follows from an S2 layout: lists of visited blocks, what no head sees, and what a cache may evict."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.s2.layout import S2Layout


def csr(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of visited key blocks.

    Args:
        blocks: [layout, query block, key block] bool.

    Returns:
        crow [layout, query blocks + 1], where each row of the list starts, and col [layout, most visited], the key
        blocks in order, padded with -1.

    >>> crow, col = csr(torch.ones(2, 2, dtype=torch.bool).tril()[None])
    >>> crow.tolist(), col.tolist()
    ([[0, 1, 3]], [[0, 0, 1]])
    """
    counts = blocks.sum(-1)
    crow = torch.cat([counts.new_zeros(len(blocks), 1), counts.cumsum(-1)], dim=-1)
    col = torch.full((len(blocks), int(crow[:, -1].max())), -1)
    for found, listed in zip(blocks, col, strict=True):
        at = found.nonzero()[:, 1]
        listed[: len(at)] = at
    return crow, col


def merged_csr(layout: S2Layout, merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """`csr` with `merged` query blocks to a tile, and how many leading rows of its tile may use each listed block.

    The rows of a tile beyond that number are hidden, in addition to the causal rule. This gives back the layout because
    visited rows that are not causally hidden come first: so it is for `kv_efficient` layouts and for no others.

    Returns:
        crow, col, and value [layout, most visited] in tokens (-1 for padding).

    Raises:
        CaptureError: the layout is not evictable, or its queries are not all keys.
    """
    blocks = layout.blocks()
    if layout.n_queries != layout.n_keys or not kv_efficient(blocks):
        raise CaptureError("query blocks can be merged only if no key block comes back once it is hidden")
    padded = torch.nn.functional.pad(blocks, (0, 0, 0, -blocks.shape[1] % merged)).unflatten(1, (-1, merged))
    rows = torch.arange(1, merged + 1)[:, None] * layout.block
    last = (padded * rows).amax(2)  # [layout, tile, key block]
    crow, col = csr(last > 0)
    value = torch.full_like(col, -1)
    for found, listed in zip(last, value, strict=True):
        at = found[found > 0]
        listed[: len(at)] = at
    return crow, col, value


def kv_efficient(blocks: Tensor) -> bool:
    """Whether a key block that lies in the past is never seen again once a query block does not see it.

    So it can be evicted from a cache. Local blocks and absolute verticals have this property, relative ones have not.

    Args:
        blocks: [layout, block, block] bool; query and key blocks are the same tokens.

    >>> kv_efficient(S2Layout(128, 128, 1, 1, block=16, local_blocks=1, vert_stride=2).blocks())
    True
    """
    n = blocks.shape[-1]
    past = torch.ones(n - 1, n, dtype=torch.bool, device=blocks.device).tril(-1)  # of row I, not of I + 1
    comes_back = blocks[..., 1:, :] & ~blocks[..., :-1, :] & past
    return not bool(comes_back.any())


def check_union(layout: S2Layout) -> tuple[int, ...]:
    """Residues r of which no head sees the blocks J = r mod vert_stride beyond its local blocks.

    The verticals of the sparse kv heads lie at J = −(h · head_step + head_offset) mod vert_stride. If these are not all
    residues, and no head is dense, what lies there is lost to the whole layer. This is easily missed with few heads,
    and more so with grouped-query attention, where the default `head_step` counts query heads and the shifts count kv
    heads.

    Returns:
        The residues that are missing, in order; () if the heads together see everything. For the bidirectional form,
        the missing distances from the local blocks, mod vert_stride. With shards, the blocks that are in none.

    >>> check_union(S2Layout(64, 64, 32, 8, vert_stride=16))  # query heads 32, kv heads 8
    (1, 2, 3, 4, 5, 6, 7, 8)
    >>> check_union(S2Layout(64, 64, 8, 8, vert_stride=8))
    ()
    """
    if layout.shards is not None:
        if None in layout.shards:
            return ()
        named = {block for shard in layout.shards for block in shard or ()}
        return tuple(sorted(set(range(-(-layout.n_keys // layout.block))) - named))
    if layout.n_dense_heads:
        return ()
    heads = range(layout.n_kv_heads if layout.causal else 1)
    shift = layout.step if layout.causal else 0
    offset = layout.head_offset if layout.causal else 0
    seen = {-(h * shift + offset) % layout.vert_stride for h in heads}
    return tuple(sorted(set(range(layout.vert_stride)) - seen))
