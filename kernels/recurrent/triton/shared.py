"""What the Triton kernels of recurrences share: how exact products are, aligned tensors, the system of a delta rule."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

SOLVED = 16
"""Positions per block of a system."""
_ALIGNED = 16


@triton.jit
def solved(found: tl.tensor, alike: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """e = found − aᵀ e within a block, where a is [j, i], what row i finds of what row j < i has written."""
    r = tl.arange(0, BLOCK)
    for i in range(1, BLOCK):
        weights = tl.sum(tl.where(r[None, :] == i, alike, 0.0), axis=1)
        taken = tl.sum(weights[:, None] * found, axis=0)
        found = tl.where(r[:, None] == i, found - taken[None, :], found)
    return found


def precision(dtype: torch.dtype, amd: bool) -> str:
    """How products with float32 factors are made: one pass of TF32 suffices for half inputs, float32 ones get three."""
    if amd:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def part_of(size: int, most: int) -> int:
    """How many of `size` features one program takes: a power of two from 16 to `most`."""
    return max(_ALIGNED, min(most, triton.next_power_of_2(size)))


def aligned(t: Tensor) -> Tensor:
    """Contiguous, of a width that divides by 16; zeros add nothing.

    Unaligned loads would need more registers than there are.
    """
    more = -t.shape[-1] % _ALIGNED
    return (pad(t, (0, more)) if more else t).contiguous()


def aligned_state(state: Tensor | None) -> Tensor | None:
    """The same of a state [batch, head, d, width] in both of its widths, in float32."""
    return None if state is None else aligned(aligned(state.to(torch.float32)).mT).mT.contiguous()


def cut(t: Tensor, *sizes: int) -> Tensor:
    """The last axes of a tensor cut back to their sizes, contiguous."""
    for axis, size in enumerate(reversed(sizes), start=1):
        t = t.narrow(-axis, 0, size)
    return t.contiguous()
