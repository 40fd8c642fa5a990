"""Sums and systems of recurrences in which a head's state fades as a whole, as Triton kernels.

A sum takes two: one walks through time and leaves the state before each block, one reads all blocks at once.

Sums of logs (base 2, within a block) are two floats each, whose differences are true to the last digit wherever they
matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from workbench.kernels.recurrent.fades import SMALLEST_LOG
from workbench.kernels.recurrent.triton.shared import (
    SOLVED,
    aligned,
    aligned_state,
    cut,
    part_of,
    precision,
    solved,
)

BLOCK = 64
"""Positions per block of a sum for half precision."""
_LOG2_E = 1.4426950408889634
_MOST_STATES = 1 << 26
"""Numbers of states that are held at once, 256 MiB: long sequences are taken in several runs of blocks."""


@triton.jit
def states_kernel(
    k: tl.tensor,  # [n_sequences · n, d]
    v: tl.tensor,  # [n_sequences · n, width]
    total: tl.tensor,  # [2, n_sequences, blocks · BLOCK] float32
    state: tl.tensor,  # [n_sequences, d, width] float32, from the one before the blocks to the one after
    states: tl.tensor,  # [n_sequences, last − first, d, width] float32
    n_sequences: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """One program: the states before the blocks `first` to `last` of one head, a tile of features and width of them."""
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    r = tl.arange(0, BLOCK)
    row = BLOCK - 1 - r if REVERSE else r

    # Offsets within a block are 32 bits wide and stay as they are; a 64-bit position moves through time.
    feature_at = row[:, None] * d + c[None, :]
    value_at = row[:, None] * width + w[None, :]
    features = c[None, :] < d
    values = w[None, :] < width
    blocks = tl.cdiv(n, BLOCK)
    high = total + sequence * blocks * BLOCK
    low = high + n_sequences * blocks * BLOCK

    state_at = c[:, None] * width + w[None, :]
    state_seen = (c[:, None] < d) & values
    state += sequence * d * width
    states += sequence * (last - first) * d * width
    held = tl.load(state + state_at, mask=state_seen, other=0.0)
    for number in range(first, last):
        block = first + last - 1 - number if REVERSE else number
        tl.store(states + (block - first).to(tl.int64) * d * width + state_at, held, mask=state_seen)
        start = block * BLOCK
        here = (start + row)[:, None] < n
        at = sequence * n + start
        ks = tl.load(k + at * d + feature_at, mask=here & features, other=0.0).to(tl.float32)
        vs = tl.load(v + at * width + value_at, mask=here & values, other=0.0).to(tl.float32)
        h = tl.load(high + start + row)
        s = tl.load(low + start + row)
        last_h = tl.load(high + start + BLOCK - 1)
        last_s = tl.load(low + start + BLOCK - 1)
        # Against time a row is as far from the state as the block's end.
        until = tl.exp2(h + s if REVERSE else (last_h - h) + (last_s - s))
        held *= tl.exp2(last_h + last_s)
        held = tl.dot(tl.trans(ks), vs * until[:, None], held, input_precision=PRECISION)
    tl.store(state + state_at, held, mask=state_seen)


@triton.jit
def sum_kernel(
    q: tl.tensor,  # [n_sequences · n, d]
    k: tl.tensor,  # [n_sequences · n, d]
    v: tl.tensor,  # [n_sequences · n, width]
    total: tl.tensor,  # [2, n_sequences, blocks · BLOCK] float32
    states: tl.tensor,  # [n_sequences, last − first, d, width] float32, before each block
    out: tl.tensor,  # [n_sequences · n, width]
    n_sequences: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    REVERSE: tl.constexpr,
    STRICT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """One program: what the positions of one block of one head read, in a tile of the width."""
    block = first + tl.program_id(0) % (last - first)
    sequence = (tl.program_id(0) // (last - first)).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK)
    row = BLOCK - 1 - r if REVERSE else r
    start = block * BLOCK
    here = (start + row)[:, None] < n
    at = sequence * n + start
    values = w[None, :] < width
    value_at = row[:, None] * width + w[None, :]
    blocks = tl.cdiv(n, BLOCK)
    high = total + sequence * blocks * BLOCK + start
    low = high + n_sequences * blocks * BLOCK
    states += (sequence * (last - first) + block - first) * d * width

    scores = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    part = tl.zeros((BLOCK, BLOCK_W), dtype=tl.float32)
    for begin in range(0, d, BLOCK_D):
        features = begin + c
        feature_at = at * d + row[:, None] * d + features[None, :]
        seen = here & (features < d)[None, :]
        qs = tl.load(q + feature_at, mask=seen, other=0.0)
        ks = tl.load(k + feature_at, mask=seen, other=0.0)
        state_at, state_seen = features[:, None] * width + w[None, :], (features < d)[:, None] & values
        held = tl.load(states + state_at, mask=state_seen, other=0.0)
        # q·k in the inputs' dtype with float32 sums. The other products have a float32 factor: halves would overflow,
        # since nothing here is scaled, and TF32 keeps as many digits as a half over float32's range.
        scores = tl.dot(qs, tl.trans(ks), scores, input_precision=PRECISION)
        part = tl.dot(qs.to(tl.float32), held, part, input_precision=PRECISION)

    h = tl.load(high + row)
    s = tl.load(low + row)
    last_h = tl.load(high + BLOCK - 1)
    last_s = tl.load(low + BLOCK - 1)
    # Against time a row comes before its columns.
    away = (h[:, None] - h[None, :]) + (s[:, None] - s[None, :])
    away = -away if REVERSE else away
    visible = r[:, None] > r[None, :] if STRICT else r[:, None] >= r[None, :]
    scores *= tl.where(visible, tl.exp2(tl.minimum(away, 0.0)), 0.0)
    part *= tl.exp2((last_h - h) + (last_s - s) if REVERSE else h + s)[:, None]
    vs = tl.load(v + at * width + value_at, mask=here & values, other=0.0).to(tl.float32)
    part = tl.dot(scores, vs, part, input_precision=PRECISION)
    tl.store(out + at * width + value_at, part.to(out.dtype.element_ty), mask=here & values)


@triton.jit
def news_kernel(
    k: tl.tensor,  # [n_sequences · n, d]
    v: tl.tensor,  # [n_sequences · n, width]
    beta: tl.tensor,  # [n_sequences · n] float32
    total: tl.tensor,  # [2, n_sequences, blocks · BLOCK] float32
    out: tl.tensor,  # [n_sequences · n, width] float32
    state: tl.tensor,  # [n_sequences, d, width] float32, from the one before to the one after
    n_sequences: tl.tensor,
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

    A position needs all features at once. The state stays in memory, which only this program reads and writes, and is
    taken some features at a time, so that no width of heads outgrows the registers.
    """
    sequence = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK)
    row = BLOCK - 1 - r if REVERSE else r
    value_at = row[:, None] * width + w[None, :]
    values = w[None, :] < width
    blocks = tl.cdiv(n, BLOCK)
    high = total + sequence * blocks * BLOCK
    low = high + n_sequences * blocks * BLOCK
    state += sequence * d * width

    for number in range(0, blocks):
        start = (blocks - 1 - number) * BLOCK if REVERSE else number * BLOCK
        here = start + row < n
        at = sequence * n + start
        h = tl.load(high + start + row)
        s = tl.load(low + start + row)
        last_h = tl.load(high + start + BLOCK - 1)
        last_s = tl.load(low + start + BLOCK - 1)
        since = tl.exp2((last_h - h) + (last_s - s) if REVERSE else h + s)
        until = tl.exp2(h + s if REVERSE else (last_h - h) + (last_s - s))
        steps = tl.load(beta + at + row, mask=here, other=0.0)

        alike = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        held = tl.zeros((BLOCK, BLOCK_W), dtype=tl.float32)
        for first in range(0, d, BLOCK_D):
            features = first + c
            seen = here[:, None] & (features < d)[None, :]
            ks = tl.load(k + at * d + row[:, None] * d + features[None, :], mask=seen, other=0.0).to(tl.float32)
            state_at, state_seen = features[:, None] * width + w[None, :], (features < d)[:, None] & values
            part = tl.load(state + state_at, mask=state_seen, other=0.0)
            alike = tl.dot(ks, tl.trans(ks), alike, input_precision=PRECISION)
            held = tl.dot(ks, part, held, input_precision=PRECISION)

        # [j, i] what row i finds of what row j has written: columns of it are taken out one after the other.
        away = (h[None, :] - h[:, None]) + (s[None, :] - s[:, None])
        away = -away if REVERSE else away
        within = tl.where(r[:, None] < r[None, :], tl.exp2(tl.minimum(away, 0.0)), 0.0)
        alike *= within * steps[:, None]
        found = tl.load(v + at * width + value_at, mask=here[:, None] & values, other=0.0).to(tl.float32)
        found -= held * since[:, None]
        found = solved(found, alike, BLOCK)
        tl.store(out + at * width + value_at, found, mask=here[:, None] & values)

        written = found * (steps * until)[:, None]
        whole = tl.exp2(last_h + last_s)
        tl.debug_barrier()  # the state has been read by all threads
        for first in range(0, d, BLOCK_D):
            features = first + c
            seen = here[:, None] & (features < d)[None, :]
            ks = tl.load(k + at * d + row[:, None] * d + features[None, :], mask=seen, other=0.0).to(tl.float32)
            state_at, state_seen = features[:, None] * width + w[None, :], (features < d)[:, None] & values
            part = tl.load(state + state_at, mask=state_seen, other=0.0) * whole
            part = tl.dot(tl.trans(ks), written, part, input_precision=PRECISION)
            tl.store(state + state_at, part, mask=state_seen)
        tl.debug_barrier()  # and is there for all


def sum_tiles(dtype: torch.dtype, d: int, width: int, amd: bool) -> dict[str, int]:
    """Sizes of the blocks of positions, features and width that one program of a sum takes, and its warps and stages.

    They are the largest powers of two that fit the registers of sm_80, sm_90 and gfx942 without spilling. Three passes
    of TF32 take more of them than one, so that float32 has smaller blocks.
    """
    single = dtype == torch.float32
    return {
        "BLOCK": 32 if single else BLOCK,
        "BLOCK_D": part_of(d, 32),
        "BLOCK_W": part_of(width, 32 if single else 64),
        "num_warps": 4 if single or amd else 8,
        "num_stages": 2,
    }


def news_tiles(dtype: torch.dtype, d: int) -> dict[str, int]:
    """The same of the system."""
    part = part_of(d, 32 if dtype == torch.float32 else 64)
    return {"BLOCK": SOLVED, "BLOCK_D": part, "BLOCK_W": 16, "num_warps": 4, "num_stages": 1}


@dataclass(frozen=True)
class Sums:
    """The sums of one recurrence.

    Args:
        log_decay: [batch, head, position], at most zero; None for no decay.
        dtype: of the inputs, which says how exact products are.
    """

    log_decay: Tensor | None
    dtype: torch.dtype

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, *, reverse: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """f(q, k, v), [batch, head, position, width] of that dtype, and the state it ends with, float32.

        Args:
            q, k: [batch, head, position, d]. v: [batch, head, position, width].
            state: [batch, head, d, width] to begin with; None for zeros.
            reverse: against time.
        """
        return self._sum(q, k, v, state, reverse, strict=False, dtype=dtype)

    def keys(self, x: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, *, reverse: bool = False) -> Tensor:
        """Σ_{j < i} (x_i·v_j) k_j of what is left of j at i, and what x reads of the state: [batch, head, position, d].

        Args:
            x, v: [batch, head, position, width]. k, state, reverse: as above.
        """
        turned = None if state is None else state.mT
        return self._sum(x, v, k, turned, reverse, strict=True, dtype=torch.float32)[0]

    def _sum(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, reverse: bool, strict: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        if q.dtype != k.dtype:
            q, k = q.float(), k.float()
        d, width = q.shape[3], v.shape[3]
        q, k, v, held = aligned(q), aligned(k), aligned(v), aligned_state(state)
        (batch, heads, n, wide), widest = q.shape, v.shape[3]
        sizes = sum_tiles(q.dtype, wide, widest, torch.version.hip is not None)
        own = {"REVERSE": reverse, "PRECISION": self._precision, **sizes}
        out = torch.empty(v.shape, dtype=dtype, device=v.device)
        held = out.new_zeros(batch, heads, wide, widest, dtype=torch.float32) if held is None else held.clone()
        totals, blocks = self._totals(q, sizes["BLOCK"]), triton.cdiv(n, sizes["BLOCK"])
        parts = [triton.cdiv(size, sizes[name]) for size, name in ((wide, "BLOCK_D"), (widest, "BLOCK_W"))]
        at_once = max(1, _MOST_STATES // held.numel())
        states = torch.empty(min(blocks, at_once), *held.shape, dtype=torch.float32, device=v.device)
        runs = [(start, min(start + at_once, blocks)) for start in range(0, blocks, at_once)]
        with torch.cuda.device_of(v):
            for first, last in reversed(runs) if reverse else runs:
                given = batch * heads, n, wide, widest, first, last
                states_kernel[batch * heads, *parts](k, v, totals, held, states, *given, **own)
                grid = batch * heads * (last - first), parts[1]
                sum_kernel[grid](q, k, v, totals, states, out, *given, STRICT=strict, **own)
        return cut(out, width), cut(held, d, width)

    def news(
        self, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None = None, *, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """e = v − f′(k, k, β e), float32, and the state it ends with."""
        d, width = k.shape[3], v.shape[3]
        k, v, first = aligned(k), aligned(v), aligned_state(state)
        (batch, heads, n, wide), widest = k.shape, v.shape[3]
        sizes = news_tiles(k.dtype, wide)
        out = torch.empty(v.shape, dtype=torch.float32, device=v.device)
        held = v.new_zeros(batch, heads, wide, widest, dtype=torch.float32) if first is None else first.clone()
        steps, totals = beta.to(torch.float32).contiguous(), self._totals(k, sizes["BLOCK"])
        with torch.cuda.device_of(v):
            news_kernel[batch * heads, triton.cdiv(widest, sizes["BLOCK_W"])](
                k, v, steps, totals, out, held, batch * heads, n, wide, widest,
                REVERSE=reverse, PRECISION=self._precision, **sizes,
            )  # fmt: skip
        return cut(out, width), cut(held, d, width)

    @property
    def _precision(self) -> str:
        return precision(self.dtype, torch.version.hip is not None)

    def _totals(self, like: Tensor, block: int) -> Tensor:
        """[2, batch · head, position] float32: sums of logs to base 2 within blocks, as two numbers that add up."""
        b, h, n, _ = like.shape
        if self.log_decay is None:
            return torch.zeros(2, b * h, n + -n % block, device=like.device)
        logs = pad(self.log_decay.double().clamp(min=SMALLEST_LOG).flatten(0, 1), (0, -n % block)) * _LOG2_E
        exact = logs.unflatten(1, (-1, block)).cumsum(-1).flatten(1)
        high = exact.float()
        return torch.stack((high, (exact - high.double()).float()))
