"""S2-Attention written out from its definition (arXiv 2407.17678), token by token and dense."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workbench.kernels.s2.layout import Shards


def s2_naive(
    q: Tensor, k: Tensor, v: Tensor, *, block: int = 64, local_blocks: int | tuple[int, int] = 4, vert_stride: int = 8,
    head_step: int | None = None, head_offset: int = 0, n_dense_heads: int = 0, homogeneous: bool = False,
    causal: bool = True, shards: Shards | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output [b, h, query, width], weights [b, h, query, key] and lse [b, h, query]; arguments as in `s2_attention`."""
    n_heads, n_kv = q.shape[1], k.shape[1]
    i = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    j = torch.arange(k.shape[2])
    far = i // block - j // block
    left, right = (local_blocks, local_blocks) if isinstance(local_blocks, int) else local_blocks
    h = torch.arange(n_kv)[:, None, None]
    step = 0 if homogeneous else max(1, vert_stride // n_heads) if head_step is None else head_step
    if shards is not None:
        seen = torch.stack([
            torch.ones_like(far < left) if shard is None else (far < left) & (-far < right) |
            torch.tensor([int(block) in shard for block in j // block]) for shard in shards
        ])  # fmt: skip
    elif causal:
        seen = (far < left) | ((j // block + h * step + head_offset) % vert_stride == 0)
    else:
        seen = (((far - left + 1).clamp(min=0) + (-far - right + 1).clamp(min=0)) % vert_stride == 0).repeat(n_kv, 1, 1)
    seen = seen | (h >= n_kv - n_dense_heads)
    seen = (seen & (j <= i) if causal else seen).repeat_interleave(n_heads // n_kv, 0)
    k, v = (x.repeat_interleave(n_heads // n_kv, 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1)
    return weights @ v, weights, scores.logsumexp(-1)
