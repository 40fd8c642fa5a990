"""Gradients of softmax attention from its log-sum-exp, tile by tile: any mask, in memory that grows with the length.

Plain torch, some twenty launches for each tile of 256 queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels import streaming
from workbench.kernels.softmax_problem import SoftmaxProblem
from workbench.kernels.softmax_tiles import SoftmaxTiles


def backward(problem: SoftmaxProblem, v: Tensor, out: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtypes, from that of the output.

    P = exp(S − lse); dV = Pᵀ dO; dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O)); dQ = scale dS K; dK = scale dSᵀ Q
    (arXiv 2205.14135, appendix B.2). A row that sees no key has no gradient.

    Args:
        problem: with its lse; without softcap, sinks or biases of keys.
        v: [batch, kv head, key, width]. out, d_out: [batch, head, query, width].
    """
    assert problem.lse is not None
    q, k, group = problem.q, problem.k, problem.shape[1] // problem.n_kv_heads
    d_q, d_k, d_v = (torch.zeros(x.shape, dtype=problem.dtype, device=x.device) for x in (q, k, v))
    less = (d_out.to(problem.dtype) * out.to(problem.dtype)).sum(-1, keepdim=True)
    for tile in streaming.tiles(SoftmaxTiles(problem)):
        heads = torch.arange(problem.shape[1], device=q.device)[tile.heads] // group
        tile_k, tile_v = (x[tile.batch, :, tile.keys][:, heads].to(problem.dtype) for x in (k, v))
        tile_q, tile_d = (x[tile.rows].to(problem.dtype) for x in (q, d_out))
        d_s = (tile_d @ tile_v.mT).sub_(less[tile.rows]).mul_(tile.p).mul_(problem.scale)
        d_q[tile.rows] += d_s @ tile_k
        d_k[tile.batch, :, tile.keys].index_add_(1, heads, d_s.mT @ tile_q)
        d_v[tile.batch, :, tile.keys].index_add_(1, heads, tile.p.mT @ tile_d)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)
