"""Lightning Attention-2 as one Triton kernel: forward, and each of the three gradients.

Every product of the backward pass is lightning attention again, with its arguments in other roles:

    o  = f(q, k, v)     forwards in time, from the initial state
    dq = f(do, v, k)    forwards in time, from the initial state transposed
    dk = f(v, do, q)    backwards in time, from the final state's gradient transposed
    dv = f(k, q, do)    backwards in time, from the final state's gradient; leaves the initial state's gradient

Backwards in time the carry has faded by one step already when it arrives (it is λ times the gradient of the state), so
that position r = 1..L reads it faded by λ^(r−1) and adds to the next one faded by λ^(L−r+1).

Only `functional.py` imports this module, when it has CUDA tensors: Triton has no wheels for some systems.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
"""Positions per block for half precision, as in the paper's code."""


@triton.jit
def lightning_kernel(
    q: tl.tensor,  # [n_sequences · n, d]
    k: tl.tensor,  # [n_sequences · n, d]
    v: tl.tensor,  # [n_sequences · n, width]
    log2_decay: tl.tensor,  # [n_heads] float32
    state_in: tl.tensor,  # [n_sequences, d, width] float32
    out: tl.tensor,  # [split, n_sequences · n, width]
    state_out: tl.tensor,  # [n_sequences, d, width] float32
    n_sequences: tl.tensor,
    n_heads: tl.tensor,
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
    """One program: all positions of one head, one tile of the width, one part of the features d.

    The output is linear in the features, so that the parts' outputs add up to the whole.
    """
    sequence = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK)
    log2 = tl.load(log2_decay + sequence % n_heads)

    # Offsets within a block are 32 bits wide and stay as they are; a 64-bit position moves through time.
    row = BLOCK - 1 - r if REVERSE else r
    feature_at = row[:, None] * d + c[None, :]
    value_at = row[:, None] * width + w[None, :]
    first = sequence * n
    features = c[None, :] < d
    values = w[None, :] < width
    out += tl.program_id(2).to(tl.int64) * n_sequences * n * width

    state_at = c[:, None] * width + w[None, :]
    state_seen = (c[:, None] < d) & values
    if FROM_STATE:
        state = tl.load(state_in + sequence * d * width + state_at, mask=state_seen, other=0.0)
    else:
        state = tl.zeros((BLOCK_D, BLOCK_W), dtype=tl.float32)

    for start in range(0, n, BLOCK):
        here = (start + r)[:, None] < n
        at = first + (n - BLOCK - start if REVERSE else start)
        qs = tl.load(q + at * d + feature_at, mask=here & features, other=0.0)
        ks = tl.load(k + at * d + feature_at, mask=here & features, other=0.0)
        vs = tl.load(v + at * width + value_at, mask=here & values, other=0.0).to(tl.float32)

        # q·k in the inputs' dtype with float32 sums. The other products have a float32 factor: halves would overflow,
        # since nothing here is scaled, and TF32 keeps as many digits as a half over float32's range.
        away = r[:, None] - r[None, :]
        within = tl.where(away >= 0, tl.exp2(log2 * tl.maximum(away, 0).to(tl.float32)), 0.0)
        scores = tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * within
        since = tl.exp2(log2 * (r + (0 if REVERSE else 1)).to(tl.float32))
        part = tl.dot(qs.to(tl.float32), state, input_precision=PRECISION) * since[:, None]
        part = tl.dot(scores, vs, part, input_precision=PRECISION)
        tl.store(out + at * width + value_at, part.to(out.dtype.element_ty), mask=here & values)

        length = tl.minimum(n - start, BLOCK)
        left = tl.maximum(length - r - (0 if REVERSE else 1), 0)
        fading = vs * tl.exp2(log2 * left.to(tl.float32))[:, None]
        state *= tl.exp2(log2 * length.to(tl.float32))
        state = tl.dot(tl.trans(ks.to(tl.float32)), fading, state, input_precision=PRECISION)

    tl.store(state_out + sequence * d * width + state_at, state, mask=state_seen)


def tiles(dtype: torch.dtype, d: int) -> dict[str, int]:
    """Sizes of the blocks of positions, features and width that one program takes, and its warps and stages.

    They are the largest powers of two that fit the registers of sm_80 and sm_90 without spilling. Three passes of TF32
    take more of them than one, so that float32 has shorter blocks.
    """
    return {
        "BLOCK": 32 if dtype == torch.float32 else BLOCK,
        "BLOCK_D": max(16, min(64, triton.next_power_of_2(d))),
        "BLOCK_W": 16,
        "num_warps": 4,
        "num_stages": 2,
    }


def precision(dtype: torch.dtype, amd: bool) -> str:
    """How products with float32 factors are made: one pass of TF32 suffices for half inputs, float32 ones get three."""
    if amd:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def forward(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output [batch, head, position, width] in v's dtype, and the final state [batch, head, d, width] float32.

    Args:
        q, k: [batch, head, position, d], v: [batch, head, position, width]; float16, bfloat16 or float32.
        decay: [head] float64 on the CPU, λ in (0, 1].
        state: the initial state; None for zeros.
    """
    return _run(q, k, v, decay, state, reverse=False)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    state: Tensor | None,
    grad_out: Tensor,
    grad_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state, from those of the output and of the final state."""
    turned, grad_turned = (None if t is None else t.transpose(-1, -2) for t in (state, grad_state))
    dq, _ = _run(grad_out, v, k, decay, turned, reverse=False)
    dk, _ = _run(v, grad_out, q, decay, grad_turned, reverse=True)
    dv, d_state = _run(k, q, grad_out, decay, grad_state, reverse=True)
    return dq, dk, dv, d_state


def _run(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    more_d, more_width = -q.shape[3] % 16, -v.shape[3] % 16
    if more_d or more_width:  # unaligned loads would need more registers than there are; zeros add nothing
        q, k, v = pad(q, (0, more_d)), pad(k, (0, more_d)), pad(v, (0, more_width))
        state = None if state is None else pad(state, (0, more_width, 0, more_d))
        out, final = _run(q, k, v, decay, state, reverse=reverse)
        d, width = q.shape[3] - more_d, v.shape[3] - more_width
        return out[..., :width].contiguous(), final[..., :d, :width].contiguous()
    batch, heads, n, d = q.shape
    width = v.shape[3]
    sizes = tiles(q.dtype, d)
    split = triton.cdiv(d, sizes["BLOCK_D"])
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty(split, *v.shape, dtype=v.dtype if split == 1 else torch.float32, device=v.device)
    final = torch.empty(batch, heads, d, width, dtype=torch.float32, device=v.device)
    first = final if state is None else state.to(torch.float32).contiguous()
    grid = (batch * heads, triton.cdiv(width, sizes["BLOCK_W"]), split)
    with torch.cuda.device_of(v):
        lightning_kernel[grid](
            q,
            k,
            v,
            torch.log2(decay).to(v.device, torch.float32),
            first,
            out,
            final,
            batch * heads,
            heads,
            n,
            d,
            width,
            REVERSE=reverse,
            FROM_STATE=state is not None,
            PRECISION=precision(q.dtype, torch.version.hip is not None),
            **sizes,
        )
    return out[0] if split == 1 else out.sum(0).to(v.dtype), final
