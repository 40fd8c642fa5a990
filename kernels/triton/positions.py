"""What the kernels share: which keys a query sees, where a tile's loop runs, and the score of one key per query."""

from __future__ import annotations

import triton
import triton.language as tl

LENGTHS = ("n_queries", "n_keys", "offset", "window", "n_targets", "target_heads", "target_batches", "n_query_blocks",
           "n_key_tiles", "n_query_tiles", "n_top", "heads_per_kv", "heads_per_layout", "layout_block")  # fmt: skip
"""Arguments for whose values no kernel is compiled anew."""
HIDDEN = tl.constexpr(-1e30)
"""Score of a hidden key: finite, so that no difference of scores is NaN."""
LOWEST = tl.constexpr(-1e20)
"""Where running maxima start: above hidden scores, so that their weights are zero, and below any other."""


@triton.jit
def seen(
    i: tl.tensor, j: tl.tensor, n_queries: tl.tensor, n_keys: tl.tensor, offset: tl.tensor, window: tl.tensor,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Whether row i sees key j by position alone; i and j broadcast."""
    shown = (i < n_queries) & (j < n_keys)
    if CAUSAL:
        shown = shown & (j <= i + offset)
    if WINDOW:
        shown = shown & (tl.abs(i + offset - j) < window)
    return shown


@triton.jit
def key_tiles(
    start: tl.tensor, n_queries: tl.tensor, n_keys: tl.tensor, offset: tl.tensor, window: tl.tensor,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """First and one past the last key tile that rows start to start + BM may see."""
    stop = tl.minimum(start + BM, n_queries)
    low, high = 0, n_keys
    if CAUSAL:
        high = tl.minimum(high, stop + offset)
    if WINDOW:
        low = tl.maximum(low, start + offset - window + 1)
        high = tl.minimum(high, stop - 1 + offset + window)
    return low // BN, tl.cdiv(tl.maximum(high, 0), BN)


@triton.jit
def query_tiles(
    start: tl.tensor, n_queries: tl.tensor, n_keys: tl.tensor, offset: tl.tensor, window: tl.tensor,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """First and one past the last query tile that may see keys start to start + BN."""
    stop = tl.minimum(start + BN, n_keys)
    low, high = 0, n_queries
    if CAUSAL:
        low = tl.maximum(low, start - offset)
    if WINDOW:
        low = tl.maximum(low, start - offset - window + 1)
        high = tl.minimum(high, stop - 1 - offset + window)
    return low // BM, tl.cdiv(tl.maximum(high, 0), BM)


@triton.jit
def shaped(
    s: tl.tensor, i: tl.tensor, j: tl.tensor, shown: tl.tensor, mask_ptr: tl.tensor, stride_mn: tl.tensor,
    stride_mk: tl.tensor, hidden_below: tl.tensor, bias_ptr: tl.tensor, softcap: tl.tensor, MASK: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What a softmax makes of scaled products: capped, with biases added, and HIDDEN where nothing is shown.

    Args:
        i, j: queries and keys, counted from where mask_ptr and bias_ptr point; they broadcast to s.
        SOFTCAP: 0 for scores as they are, 1 for capped ones, 2 for logarithms of magnitudes.
        MASK: 0 for no mask tensor, 1 for one byte each (0 hides), 2 for what is added (below hidden_below it hides).
    """
    if SOFTCAP == 2:
        shown = shown & (s != 0)
        s = tl.log(tl.where(s != 0, tl.abs(s), 1.0))
    if SOFTCAP == 1:
        s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1)
    if BIAS:
        s += tl.load(bias_ptr + j, mask=shown, other=0.0)
    if MASK > 0:
        m = tl.load(mask_ptr + (i * stride_mn + j * stride_mk), mask=shown, other=0)
        if MASK == 1:
            shown = shown & (m != 0)
        else:
            added = m.to(tl.float32)
            shown = shown & (added > hidden_below)
            s += added
    return tl.where(shown, s, HIDDEN)


@triton.jit
def since(sums_ptr: tl.tensor, base: tl.tensor, at: tl.tensor, n: tl.tensor) -> tl.tensor:
    """ln of what is left, where the sums of log decays are `base`, of the positions `at`; subtracted in float64."""
    return (base - tl.load(sums_ptr + at, mask=(at >= 0) & (at < n), other=0.0)).to(tl.float32)


@triton.jit
def score_at(
    q_ptr: tl.tensor, k_ptr: tl.tensor, rows: tl.tensor, keys: tl.tensor, wanted: tl.tensor, stride_q: tl.tensor,
    stride_k: tl.tensor, scale: tl.tensor, D: tl.constexpr, BD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Score of each row with one key of its own, in float32; rows that are not `wanted` read nothing.

    A gather of one key per row is O(rows · d): far less than comparing positions in every tile.
    """
    CHUNK: tl.constexpr = 32
    total = tl.zeros(rows.shape, tl.float32)
    q_row = q_ptr + rows.to(tl.int64)[:, None] * stride_q
    k_row = k_ptr + keys.to(tl.int64)[:, None] * stride_k
    for first in tl.range(0, BD, CHUNK, num_stages=1):
        d = first + tl.arange(0, CHUNK)[None, :]
        inside = wanted[:, None] & (d < D)
        q = tl.load(q_row + d, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(k_row + d, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(q * k, axis=1)
    return total * scale
