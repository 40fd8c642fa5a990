"""Sums and systems of recurrences in which each channel of the state fades by itself, as Triton kernels.

Within a block fades are carried from one position to the next: what is left of a key is multiplied by every decay that
it lives through. None is above one and none is a difference of sums, so that a decay of nearly nothing costs what comes
after it no digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.recurrent.triton.shared import (
    SOLVED,
    aligned,
    aligned_state,
    cut,
    part_of,
    precision,
    solved,
)


@triton.jit
def faded(
    q: tl.tensor,  # of the block's first position, as k and log_decay: [n, d]
    k: tl.tensor,
    log_decay: tl.tensor,
    rest: tl.tensor,  # positions from the block's first on
    c: tl.tensor,  # [BLOCK_D] features
    d: tl.tensor,
    REVERSE: tl.constexpr,
    STRICT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Of one block and some features, in the order of the steps through time:

    Σ_c q_i k_j with what is left of channel c of j at i, [i, j]; q faded from the block's start to each position and k
    from each position to its end, [position, c]; what is left throughout, [c].
    """
    r = tl.arange(0, BLOCK)
    left = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    reads = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    scores = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    since = tl.full((BLOCK_D,), 1.0, dtype=tl.float32)
    for step in range(0, BLOCK):
        row = BLOCK - 1 - step if REVERSE else step
        at = row * d + c
        seen = (c < d) & (row < rest)
        fade = tl.exp(tl.load(log_decay + at, mask=seen, other=0.0))
        query = tl.load(q + at, mask=seen, other=0.0).to(tl.float32)
        key = tl.load(k + at, mask=seen, other=0.0).to(tl.float32)
        here = (r == step)[:, None]
        if not REVERSE:  # a state fades before it is read; against time, after it
            left *= fade[None, :]
            since *= fade
        if not STRICT:
            left = tl.where(here, key[None, :], left)
        scores = tl.where(here, tl.sum(query[None, :] * left, axis=1)[None, :], scores)
        reads = tl.where(here, (query * since)[None, :], reads)
        if STRICT:
            left = tl.where(here, key[None, :], left)
        if REVERSE:
            left *= fade[None, :]
            since *= fade
    return scores, reads, left, since


@triton.jit
def channel_sum_kernel(
    q: tl.tensor,  # [n_sequences · n, d]
    k: tl.tensor,  # [n_sequences · n, d]
    v: tl.tensor,  # [n_sequences · n, width]
    log_decay: tl.tensor,  # [n_sequences · n, d] float32
    state_in: tl.tensor,  # [n_sequences, d, width] float32
    out: tl.tensor,  # [split, n_sequences · n, width]
    state_out: tl.tensor,  # [n_sequences, d, width] float32
    n_sequences: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    width: tl.tensor,
    REVERSE: tl.constexpr,
    FROM_STATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """One program: f(q, k, v) of all positions of one head, one tile of the width, one part of the features d."""
    sequence = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK)
    row = BLOCK - 1 - r if REVERSE else r
    value_at = row[:, None] * width + w[None, :]
    values = w[None, :] < width
    out += tl.program_id(2).to(tl.int64) * n_sequences * n * width
    blocks = tl.cdiv(n, BLOCK)

    state_at = c[:, None] * width + w[None, :]
    state_seen = (c[:, None] < d) & values
    if FROM_STATE:
        state = tl.load(state_in + sequence * d * width + state_at, mask=state_seen, other=0.0)
    else:
        state = tl.zeros((BLOCK_D, BLOCK_W), dtype=tl.float32)

    for number in range(0, blocks):
        start = (blocks - 1 - number) * BLOCK if REVERSE else number * BLOCK
        here = (start + row)[:, None] < n
        at = sequence * n + start
        scores, reads, left, whole = faded(
            q + at * d, k + at * d, log_decay + at * d, n - start, c, d, REVERSE, False, BLOCK, BLOCK_D
        )
        vs = tl.load(v + at * width + value_at, mask=here & values, other=0.0).to(tl.float32)
        part = tl.dot(reads, state, input_precision=PRECISION)
        part = tl.dot(scores, vs, part, input_precision=PRECISION)
        tl.store(out + at * width + value_at, part.to(out.dtype.element_ty), mask=here & values)
        state *= whole[:, None]
        state = tl.dot(tl.trans(left), vs, state, input_precision=PRECISION)

    tl.store(state_out + sequence * d * width + state_at, state, mask=state_seen)


@triton.jit
def channel_keys_kernel(
    x: tl.tensor,  # [n_sequences · n, width]
    k: tl.tensor,  # [n_sequences · n, d]
    v: tl.tensor,  # [n_sequences · n, width]
    log_decay: tl.tensor,  # [n_sequences · n, d] float32
    state_in: tl.tensor,  # [n_sequences, d, width] float32
    out: tl.tensor,  # [split, n_sequences · n, d] float32
    n_sequences: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    width: tl.tensor,
    REVERSE: tl.constexpr,
    FROM_STATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """One program: Σ_{j < i} (x_i·v_j) k_j faded, for one head, one part of the features, one part of the width.

    The state is that of `channel_sum_kernel`, read along its width.
    """
    sequence = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK)
    row = BLOCK - 1 - r if REVERSE else r
    feature_at = row[:, None] * d + c[None, :]
    value_at = row[:, None] * width + w[None, :]
    features = c[None, :] < d
    values = w[None, :] < width
    out += tl.program_id(1).to(tl.int64) * n_sequences * n * d
    blocks = tl.cdiv(n, BLOCK)

    if FROM_STATE:
        state_at = c[:, None] * width + w[None, :]
        state = tl.load(state_in + sequence * d * width + state_at, mask=(c[:, None] < d) & values, other=0.0)
    else:
        state = tl.zeros((BLOCK_D, BLOCK_W), dtype=tl.float32)

    for number in range(0, blocks):
        start = (blocks - 1 - number) * BLOCK if REVERSE else number * BLOCK
        here = (start + row)[:, None] < n
        at = sequence * n + start
        xs = tl.load(x + at * width + value_at, mask=here & values, other=0.0).to(tl.float32)
        vs = tl.load(v + at * width + value_at, mask=here & values, other=0.0).to(tl.float32)
        alike = tl.dot(xs, tl.trans(vs), input_precision=PRECISION)
        read = tl.dot(xs, tl.trans(state), input_precision=PRECISION)
        left = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
        found = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
        fades = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
        since = tl.full((BLOCK_D,), 1.0, dtype=tl.float32)
        for step in range(0, BLOCK):
            place = BLOCK - 1 - step if REVERSE else step
            one = (at + place) * d + c
            seen = (c < d) & (start + place < n)
            fade = tl.exp(tl.load(log_decay + one, mask=seen, other=0.0))
            key = tl.load(k + one, mask=seen, other=0.0).to(tl.float32)
            now = (r == step)[:, None]
            if not REVERSE:
                left *= fade[None, :]
                since *= fade
            weights = tl.sum(tl.where(now, alike, 0.0), axis=0)
            found = tl.where(now, tl.sum(weights[:, None] * left, axis=0)[None, :], found)
            fades = tl.where(now, since[None, :], fades)
            left = tl.where(now, key[None, :], left)
            if REVERSE:
                left *= fade[None, :]
                since *= fade
        found += read * fades
        tl.store(out + at * d + feature_at, found, mask=here & features)
        state *= since[:, None]
        state = tl.dot(tl.trans(left), vs, state, input_precision=PRECISION)


@triton.jit
def channel_news_kernel(
    k: tl.tensor,  # [n_sequences · n, d]
    v: tl.tensor,  # [n_sequences · n, width]
    beta: tl.tensor,  # [n_sequences · n] float32
    log_decay: tl.tensor,  # [n_sequences · n, d] float32
    out: tl.tensor,  # [n_sequences · n, width] float32
    state: tl.tensor,  # [n_sequences, d, width] float32, from the one before to the one after
    n: tl.tensor,
    d: tl.tensor,
    width: tl.tensor,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """One program: e = v − f′(k, k, β e) at all positions of one head, for one tile of the width.

    The state stays in memory, and is taken some features at a time.
    """
    sequence = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    r = tl.arange(0, BLOCK)
    row = BLOCK - 1 - r if REVERSE else r
    value_at = row[:, None] * width + w[None, :]
    values = w[None, :] < width
    blocks = tl.cdiv(n, BLOCK)
    state += sequence * d * width

    for number in range(0, blocks):
        start = (blocks - 1 - number) * BLOCK if REVERSE else number * BLOCK
        here = start + row < n
        at = sequence * n + start
        steps = tl.load(beta + at + row, mask=here, other=0.0)
        scores = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        held = tl.zeros((BLOCK, BLOCK_W), dtype=tl.float32)
        for first in range(0, d, BLOCK_D):
            c = first + tl.arange(0, BLOCK_D)
            more, reads, _, _ = faded(
                k + at * d, k + at * d, log_decay + at * d, n - start, c, d, REVERSE, True, BLOCK, BLOCK_D
            )
            state_at, state_seen = c[:, None] * width + w[None, :], (c < d)[:, None] & values
            part = tl.load(state + state_at, mask=state_seen, other=0.0)
            scores += more
            held = tl.dot(reads, part, held, input_precision=PRECISION)

        found = tl.load(v + at * width + value_at, mask=here[:, None] & values, other=0.0).to(tl.float32) - held
        found = solved(found, tl.trans(scores) * steps[:, None], BLOCK)
        tl.store(out + at * width + value_at, found, mask=here[:, None] & values)

        written = found * steps[:, None]
        tl.debug_barrier()  # the state has been read by all threads
        for first in range(0, d, BLOCK_D):
            c = first + tl.arange(0, BLOCK_D)
            _, _, left, whole = faded(
                k + at * d, k + at * d, log_decay + at * d, n - start, c, d, REVERSE, True, BLOCK, BLOCK_D
            )
            state_at, state_seen = c[:, None] * width + w[None, :], (c < d)[:, None] & values
            part = tl.load(state + state_at, mask=state_seen, other=0.0) * whole[:, None]
            part = tl.dot(tl.trans(left), written, part, input_precision=PRECISION)
            tl.store(state + state_at, part, mask=state_seen)
        tl.debug_barrier()  # and is there for all


def channel_tiles(d: int, width: int, exact: bool) -> dict[str, int]:
    """Sizes of the blocks of positions, features and width that one program takes, and its warps and stages.

    Args:
        exact: products in three passes of TF32, which take more registers than one.
    """
    most = 32 if exact else 64
    sizes = {"BLOCK": SOLVED, "BLOCK_D": part_of(d, most), "BLOCK_W": part_of(width, most)}
    return sizes | {"num_warps": 4, "num_stages": 1}


@dataclass(frozen=True)
class ChannelSums:
    """As `Sums`, with log_decay [batch, head, position, d], one for each channel of the state."""

    log_decay: Tensor
    dtype: torch.dtype

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, *, reverse: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """f(q, k, v), as there."""
        d, width = q.shape[3], v.shape[3]
        q, k, v, first = aligned(q), aligned(k), aligned(v), aligned_state(state)
        sizes = self._tiles(q, v)
        (batch, heads, n, wide), widest = q.shape, v.shape[3]
        split = triton.cdiv(wide, sizes["BLOCK_D"])
        out = torch.empty(split, *v.shape, dtype=dtype if split == 1 else torch.float32, device=v.device)
        final = torch.empty(batch, heads, wide, widest, dtype=torch.float32, device=v.device)
        with torch.cuda.device_of(v):
            channel_sum_kernel[batch * heads, triton.cdiv(widest, sizes["BLOCK_W"]), split](
                q, k, v, self._logs, final if first is None else first, out, final, batch * heads, n, wide, widest,
                REVERSE=reverse, FROM_STATE=first is not None, PRECISION=self._precision, **sizes,
            )  # fmt: skip
        return cut(out[0] if split == 1 else out.sum(0).to(dtype), width), cut(final, d, width)

    def keys(self, x: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, *, reverse: bool = False) -> Tensor:
        """Σ_{j < i} (x_i·v_j) k_j, as there."""
        d = k.shape[3]
        x, k, v, first = aligned(x), aligned(k), aligned(v), aligned_state(state)
        sizes = self._tiles(k, v)
        (batch, heads, n, wide), widest = k.shape, v.shape[3]
        split = triton.cdiv(widest, sizes["BLOCK_W"])
        out = torch.empty(split, *k.shape, dtype=torch.float32, device=k.device)
        with torch.cuda.device_of(v):
            channel_keys_kernel[batch * heads, split, triton.cdiv(wide, sizes["BLOCK_D"])](
                x, k, v, self._logs, out if first is None else first, out, batch * heads, n, wide, widest,
                REVERSE=reverse, FROM_STATE=first is not None, PRECISION=self._precision, **sizes,
            )  # fmt: skip
        return cut(out[0] if split == 1 else out.sum(0), d)

    def news(
        self, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None = None, *, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """e = v − f′(k, k, β e), as there."""
        d, width = k.shape[3], v.shape[3]
        k, v, first = aligned(k), aligned(v), aligned_state(state)
        sizes = self._tiles(k, v) | {"BLOCK_W": 16}
        (batch, heads, n, wide), widest = k.shape, v.shape[3]
        out = torch.empty(v.shape, dtype=torch.float32, device=v.device)
        held = v.new_zeros(batch, heads, wide, widest, dtype=torch.float32) if first is None else first.clone()
        with torch.cuda.device_of(v):
            channel_news_kernel[batch * heads, triton.cdiv(widest, sizes["BLOCK_W"])](
                k, v, beta.to(torch.float32).contiguous(), self._logs, out, held, n, wide, widest,
                REVERSE=reverse, PRECISION=self._precision, **sizes,
            )  # fmt: skip
        return cut(out, width), cut(held, d, width)

    @property
    def _precision(self) -> str:
        return precision(self.dtype, torch.version.hip is not None)

    @property
    def _logs(self) -> Tensor:
        return aligned(self.log_decay.to(torch.float32))

    def _tiles(self, k: Tensor, v: Tensor) -> dict[str, int]:
        return channel_tiles(k.shape[3], v.shape[3], self.dtype == torch.float32)
