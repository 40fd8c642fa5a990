"""Row statistics and the attention output in one pass over the keys, with an online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from workbench.kernels.triton.positions import LENGTHS, LOWEST, key_tiles, score_at, seen, shaped, since


@triton.jit(do_not_specialize=LENGTHS)
def rows_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, out_ptr: tl.tensor, stats_ptr: tl.tensor,
    peak_key_ptr: tl.tensor, target_ptr: tl.tensor, at_ptr: tl.tensor, list_ptr: tl.tensor, count_ptr: tl.tensor,
    word_ptr: tl.tensor, sink_ptr: tl.tensor, id_ptr: tl.tensor, mask_ptr: tl.tensor, bias_ptr: tl.tensor,
    stride_mb: tl.tensor, stride_mh: tl.tensor, stride_mn: tl.tensor, stride_mk: tl.tensor, stride_bb: tl.tensor,
    stride_bh: tl.tensor, hidden_below: tl.tensor, softcap: tl.tensor, stride_qb: tl.tensor, stride_qh: tl.tensor,
    stride_qn: tl.tensor, stride_kb: tl.tensor, stride_kh: tl.tensor, stride_kn: tl.tensor, stride_vb: tl.tensor,
    stride_vh: tl.tensor, stride_vn: tl.tensor, n_queries: tl.tensor, n_keys: tl.tensor, offset: tl.tensor,
    window: tl.tensor, heads_per_kv: tl.tensor, n_targets: tl.tensor, target_heads: tl.tensor,
    target_batches: tl.tensor, heads_per_layout: tl.tensor, layout_block: tl.tensor, n_query_blocks: tl.tensor,
    n_key_tiles: tl.tensor, scale: tl.tensor, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPARSE: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, STATS: tl.constexpr, INDUCTION: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of BM queries of one head. See `call` for the shapes.

    Sums are taken relative to the running maximum m and rescaled when it moves. The entropy sums p·(s−m) rather than
    p·s, which would cancel against the lse. Distances are taken from the distance of the row's heaviest key so far:
    then Σp(d−r)² ≤ variance·(1 + 1/largest weight), and nothing is lost to rounding in far, narrow rows. A sink logit
    joins the denominator when all keys have been seen. Where heads fade (BIAS 2), bias_ptr holds the sums of log
    decays: scores count from the tile's first row, so that float32 is near to exact wherever weights are not nothing.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the last rows take longest: start with them
    head, batch = tl.program_id(1), tl.program_id(2)
    start = tile * BM
    rows = start + tl.arange(0, BM)
    columns = tl.arange(0, BN)
    d = tl.arange(0, BD)
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

    m = tl.full([BM], LOWEST, tl.float32)
    mass = tl.zeros([BM], tl.float32)
    if STATS:
        log_sum = tl.zeros([BM], tl.float32)
        squares = tl.zeros([BM], tl.float32)
        away, away2 = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        peak_key = tl.full([BM], -1, tl.int32)
        near = tl.zeros([BM], tl.int32)
    if INDUCTION:
        copied = tl.zeros([BM], tl.float32)
        id_ptr += batch.to(tl.int64) * (n_keys + 1)
        own = tl.load(id_ptr + 1 + rows + offset, mask=rows < n_queries, other=0)
    if OUT:
        dv = tl.arange(0, BDV)
        v_ptr += batch.to(tl.int64) * stride_vb + (head // heads_per_kv).to(tl.int64) * stride_vh
        total = tl.zeros([BM, BDV], tl.float32)

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
        if STATS:
            top, at = tl.max(s, axis=1, return_indices=True)
            peak_key = tl.where(top > m, key_tile * BN + at, peak_key)
        else:
            top = tl.max(s, axis=1)
        higher = tl.maximum(m, top)
        fade = tl.exp(m - higher)
        s = s - higher[:, None]
        p = tl.exp(s)
        if STATS:
            log_sum = fade * (log_sum + (m - higher) * mass) + tl.sum(p * s, axis=1)
            squares = fade * fade * squares + tl.sum(p * p, axis=1)
            nearer = tl.abs(rows + offset - peak_key)
            step = (near - nearer).to(tl.float32)
            near = nearer
            distance = (tl.abs((rows + offset)[:, None] - keys[None, :]) - near[:, None]).to(tl.float32)
            weighted = p * distance
            away2 = fade * (away2 + step * (2 * away + step * mass)) + tl.sum(weighted * distance, axis=1)
            away = fade * (away + step * mass) + tl.sum(weighted, axis=1)
        if INDUCTION:
            before = tl.load(id_ptr + keys, mask=keys < n_keys, other=0)
            follows = (own[:, None] == before[None, :]) & (keys[None, :] <= (rows + offset)[:, None])
            copied = fade * copied + tl.sum(tl.where(follows, p, 0.0), axis=1)
        mass = fade * mass + tl.sum(p, axis=1)
        m = higher
        if OUT:
            to = columns[:, None] * stride_vn + dv[None, :]
            v = tl.load(v_ptr + tl.cast(key_tile * BN, tl.int64) * stride_vn + to,
                        mask=(keys < n_keys)[:, None] & (dv < DV)[None, :], other=0.0)  # fmt: skip
            total = tl.dot(p.to(v.dtype), v, total * fade[:, None], input_precision=PRECISION)

    alive = mass != 0  # or NaN, which goes on
    some = tl.where(alive, mass, 1.0)
    # A weight is p = exp(s − m) times `share`; `above` is the log of the denominator over that of the heaviest key.
    above = tl.log(some)
    share = 1 / some
    whole = tl.where(alive, 1.0, 0.0)
    if SINKS:
        sink = tl.load(sink_ptr + head).to(tl.float32)
        most = tl.maximum(m, sink)
        above = tl.where(alive, most - m + tl.log(mass * tl.exp(m - most) + tl.exp(sink - most)), 0.0)
        share = tl.exp(-above)
        whole = mass * share
    lse = tl.where(alive, m + above, LOWEST if SOFTCAP == 2 else float("-inf"))
    if BIAS == 2:
        lse -= since(bias_ptr, base, rows + offset, n_keys)
    stored = rows < n_queries
    plane = (tl.num_programs(1) * tl.num_programs(2)).to(tl.int64) * n_queries
    stats_ptr += here * n_queries + rows
    tl.store(stats_ptr, lse, mask=stored)
    if STATS:
        # Only here is it known which rows of magnitudes have no weight: what is told of them is NaN.
        none = tl.where(alive, 0.0, float("nan")) if SOFTCAP == 2 else 0.0
        tl.store(stats_ptr + plane, tl.maximum(whole * above - log_sum * share, 0.0) + none, mask=stored)
        tl.store(stats_ptr + 2 * plane, share + none, mask=stored)  # the heaviest key has p = exp(m − m)
        tl.store(stats_ptr + 3 * plane, 1 / (share * share * tl.where(alive, squares, 1.0)) + none, mask=stored)
        mean = away / some
        tl.store(stats_ptr + 4 * plane, near.to(tl.float32) + mean + none, mask=stored)
        tl.store(stats_ptr + 5 * plane, tl.maximum(away2 / some - mean * mean, 0.0) + none, mask=stored)
        if INDUCTION:
            tl.store(stats_ptr + 6 * plane, copied * share + none, mask=stored)
        tl.store(peak_key_ptr + here * n_queries + rows, peak_key, mask=stored)
        for t in range(0, n_targets):
            group = (t * target_batches + batch % target_batches) * target_heads + head % target_heads
            key = tl.load(target_ptr + group.to(tl.int64) * n_queries + rows, mask=stored, other=-1)
            wanted = key >= 0
            s_at = score_at(q_ptr, k_ptr, rows, key, wanted, stride_qn, stride_kn, scale, D, BD)
            s_at = shaped(s_at, (rows - start).to(tl.int64), key.to(tl.int64), wanted, mask_ptr, stride_mn, stride_mk,
                          hidden_below, bias_ptr, softcap, MASK, BIAS == 1, SOFTCAP)  # fmt: skip
            if BIAS == 2:
                s_at += since(bias_ptr, base, key, n_keys)
            tl.store(at_ptr + t * plane + here * n_queries + rows, tl.exp(s_at - m) * share + none, mask=stored)
    if OUT:
        out_ptr += (here * n_queries + rows.to(tl.int64))[:, None] * DV + dv[None, :]
        tl.store(
            out_ptr, (total * share[:, None]).to(out_ptr.dtype.element_ty), mask=stored[:, None] & (dv < DV)[None, :]
        )
