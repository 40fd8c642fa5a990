"""What the finished lse makes possible: received mass and pooled maps by key tile, heaviest keys by query tile."""

from __future__ import annotations

import triton
import triton.language as tl

from workbench.kernels.triton.positions import HIDDEN, LENGTHS, LOWEST, key_tiles, query_tiles, seen, shaped, since


@triton.jit(do_not_specialize=LENGTHS)
def columns_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, lse_ptr: tl.tensor, received_ptr: tl.tensor, sum_ptr: tl.tensor,
    max_ptr: tl.tensor, list_ptr: tl.tensor, count_ptr: tl.tensor, word_ptr: tl.tensor, mask_ptr: tl.tensor,
    bias_ptr: tl.tensor, stride_mb: tl.tensor, stride_mh: tl.tensor, stride_mn: tl.tensor, stride_mk: tl.tensor,
    stride_bb: tl.tensor, stride_bh: tl.tensor, hidden_below: tl.tensor, softcap: tl.tensor, stride_qb: tl.tensor,
    stride_qh: tl.tensor, stride_qn: tl.tensor, stride_kb: tl.tensor, stride_kh: tl.tensor, stride_kn: tl.tensor,
    n_queries: tl.tensor, n_keys: tl.tensor, offset: tl.tensor, window: tl.tensor, heads_per_kv: tl.tensor,
    heads_per_layout: tl.tensor, layout_block: tl.tensor, n_query_blocks: tl.tensor, n_key_tiles: tl.tensor,
    n_query_tiles: tl.tensor, scale: tl.tensor, D: tl.constexpr, BD: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPARSE: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, POOLED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of BN keys of one head, over all queries that see it: no two programs write the same number.

    Tiles are [key, query], so that the sum over queries stays within a warp.
    """
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tile * BN
    keys = start + tl.arange(0, BN)
    inside = tl.arange(0, BM)
    d = tl.arange(0, BD)
    here = (batch * tl.num_programs(1) + head).to(tl.int64)
    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += batch.to(tl.int64) * stride_kb + (head // heads_per_kv).to(tl.int64) * stride_kh
    k = tl.load(k_ptr + keys.to(tl.int64)[:, None] * stride_kn + d[None, :],
                mask=(keys < n_keys)[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
    lse_ptr += here * n_queries

    if MASK > 0:
        mask_ptr += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh + start.to(tl.int64) * stride_mk
    if BIAS > 0:
        bias_ptr += batch.to(tl.int64) * stride_bb + head.to(tl.int64) * stride_bh
    if SPARSE:
        layout = head // heads_per_layout
        first, last = 0, tl.load(count_ptr + layout * n_key_tiles + tile)
        list_ptr += (layout * n_key_tiles + tile).to(tl.int64) * n_query_tiles
        word_ptr += (layout * n_query_blocks).to(tl.int64) * n_key_tiles + tile
        bit = tl.arange(0, BN) // tl.minimum(layout_block, BN)
    else:
        first, last = query_tiles(start, n_queries, n_keys, offset, window, CAUSAL, WINDOW, BM, BN)

    received = tl.zeros([BN], tl.float32)
    for t in range(first, last):
        query_tile = tl.load(list_ptr + t) if SPARSE else t
        rows = query_tile * BM + inside
        q = tl.load(q_ptr + tl.cast(query_tile * BM, tl.int64) * stride_qn + (inside[None, :] * stride_qn + d[:, None]),
                    mask=(rows < n_queries)[None, :] & (d < D)[:, None], other=0.0)  # fmt: skip
        lse = tl.load(lse_ptr + rows, mask=rows < n_queries, other=0.0)
        s = tl.dot(k, q, input_precision=PRECISION) * scale
        shown = seen(rows[None, :], keys[:, None], n_queries, n_keys, offset, window, CAUSAL, WINDOW)
        if SPARSE:
            query_block = tl.minimum(rows // layout_block, n_query_blocks - 1)
            word = tl.load(word_ptr + query_block.to(tl.int64) * n_key_tiles)
            shown = shown & (((word[None, :] >> bit[:, None]) & 1) != 0)
        mask_tile = mask_ptr + tl.cast(query_tile * BM, tl.int64) * stride_mn
        s = shaped(s, inside[None, :], (keys - start)[:, None], shown, mask_tile, stride_mn, stride_mk, hidden_below,
                   bias_ptr + start, softcap, MASK, BIAS == 1, SOFTCAP)  # fmt: skip
        if BIAS == 2:
            base = tl.load(bias_ptr + query_tile * BM + offset)
            s += since(bias_ptr, base, keys, n_keys)[:, None]
            lse += since(bias_ptr, base, rows + offset, n_keys)
        p = tl.exp(tl.where(s > LOWEST, s - lse[None, :], HIDDEN))
        received += tl.sum(p, axis=1)
        if POOLED:
            blocks = tl.reshape(p, [BN // EDGE, EDGE, BM // EDGE, EDGE])
            sums = tl.sum(tl.sum(blocks, axis=3), axis=1)
            most = tl.max(tl.max(blocks, axis=3), axis=1)
            n_down, n_across = tl.cdiv(n_queries, EDGE), tl.cdiv(n_keys, EDGE)
            down = query_tile * (BM // EDGE) + tl.arange(0, BM // EDGE)
            across = tile * (BN // EDGE) + tl.arange(0, BN // EDGE)
            cell = (here * n_down + down)[None, :] * n_across + across[:, None]
            stored = (down < n_down)[None, :] & (across < n_across)[:, None]
            tl.store(sum_ptr + cell, sums, mask=stored)
            tl.store(max_ptr + cell, most, mask=stored)
    tl.store(received_ptr + here * n_keys + keys, received, mask=keys < n_keys)


@triton.jit(do_not_specialize=LENGTHS)
def top_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, lse_ptr: tl.tensor, weight_ptr: tl.tensor, key_ptr: tl.tensor,
    list_ptr: tl.tensor, count_ptr: tl.tensor, word_ptr: tl.tensor, mask_ptr: tl.tensor, bias_ptr: tl.tensor,
    stride_mb: tl.tensor, stride_mh: tl.tensor, stride_mn: tl.tensor, stride_mk: tl.tensor, stride_bb: tl.tensor,
    stride_bh: tl.tensor, hidden_below: tl.tensor, softcap: tl.tensor, stride_qb: tl.tensor, stride_qh: tl.tensor,
    stride_qn: tl.tensor, stride_kb: tl.tensor, stride_kh: tl.tensor, stride_kn: tl.tensor, n_queries: tl.tensor,
    n_keys: tl.tensor, offset: tl.tensor, window: tl.tensor, heads_per_kv: tl.tensor, heads_per_layout: tl.tensor,
    layout_block: tl.tensor, n_query_blocks: tl.tensor, n_key_tiles: tl.tensor, n_top: tl.tensor, scale: tl.tensor,
    D: tl.constexpr, BD: tl.constexpr, SLOTS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SPARSE: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """The n_top largest weights of BM queries of one head and their keys, in no order; unused slots have key −1.

    A tile is searched only while one of its scores beats the least that its row keeps: after the first tiles, rarely.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2)
    start = tile * BM
    rows = start + tl.arange(0, BM)
    columns = tl.arange(0, BN)
    d = tl.arange(0, BD)
    slots = tl.arange(0, SLOTS)
    here = (batch * tl.num_programs(1) + head).to(tl.int64)
    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += batch.to(tl.int64) * stride_kb + (head // heads_per_kv).to(tl.int64) * stride_kh
    q = tl.load(q_ptr + rows.to(tl.int64)[:, None] * stride_qn + d[None, :],
                mask=(rows < n_queries)[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip

    if MASK > 0:
        mask_ptr += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh + start.to(tl.int64) * stride_mn
    if BIAS > 0:
        bias_ptr += batch.to(tl.int64) * stride_bb + head.to(tl.int64) * stride_bh
    if BIAS == 2:
        base = tl.load(bias_ptr + start + offset)
    if SPARSE:
        layout = head // heads_per_layout
        n_tiles = tl.num_programs(0)
        first, last = 0, tl.load(count_ptr + layout * n_tiles + tile)
        list_ptr += (layout * n_tiles + tile).to(tl.int64) * n_key_tiles
        query_block = tl.minimum(rows // layout_block, n_query_blocks - 1)
        word_row = word_ptr + (layout * n_query_blocks + query_block).to(tl.int64) * n_key_tiles
        bit = columns // tl.minimum(layout_block, BN)
    else:
        first, last = key_tiles(start, n_queries, n_keys, offset, window, CAUSAL, WINDOW, BM, BN)

    kept = tl.zeros([BM, SLOTS], tl.float32) + tl.where(slots < n_top, LOWEST, float("inf"))[None, :]
    kept_key = tl.full([BM, SLOTS], -1, tl.int32)
    for t in range(first, last):
        key_tile = tl.load(list_ptr + t) if SPARSE else t
        keys = key_tile * BN + columns
        k = tl.load(k_ptr + tl.cast(key_tile * BN, tl.int64) * stride_kn + (columns[None, :] * stride_kn + d[:, None]),
                    mask=(keys < n_keys)[None, :] & (d < D)[:, None], other=0.0)  # fmt: skip
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        shown = seen(rows[:, None], keys[None, :], n_queries, n_keys, offset, window, CAUSAL, WINDOW)
        if SPARSE:
            word = tl.load(word_row + key_tile)
            shown = shown & (((word[:, None] >> bit[None, :]) & 1) != 0)
        mask_tile = mask_ptr + tl.cast(key_tile * BN, tl.int64) * stride_mk
        s = shaped(s, (rows - start)[:, None], columns[None, :], shown, mask_tile, stride_mn, stride_mk, hidden_below,
                   bias_ptr + key_tile * BN, softcap, MASK, BIAS == 1, SOFTCAP)  # fmt: skip
        if BIAS == 2:
            s += since(bias_ptr, base, keys, n_keys)[None, :]
        gain = tl.max(tl.max(s, axis=1) - tl.min(kept, axis=1), axis=0)
        while gain > 0:
            top, at = tl.max(s, axis=1, return_indices=True)
            least, slot = tl.min(kept, axis=1, return_indices=True)
            better = top > least
            put = better[:, None] & (slots[None, :] == slot[:, None])
            kept = tl.where(put, top[:, None], kept)
            kept_key = tl.where(put, (key_tile * BN + at)[:, None], kept_key)
            s = tl.where(better[:, None] & (columns[None, :] == at[:, None]), HIDDEN, s)
            gain = tl.max(tl.max(s, axis=1) - tl.min(kept, axis=1), axis=0)

    lse = tl.load(lse_ptr + here * n_queries + rows, mask=rows < n_queries, other=0.0)
    if BIAS == 2:
        lse += since(bias_ptr, base, rows + offset, n_keys)
    weight = tl.exp(tl.where(kept_key >= 0, kept - lse[:, None], HIDDEN))
    to = (here * n_queries + rows)[:, None] * n_top + slots[None, :]
    stored = (rows < n_queries)[:, None] & (slots < n_top)[None, :]
    tl.store(weight_ptr + to, weight, mask=stored)
    tl.store(key_ptr + to, kept_key, mask=stored)
