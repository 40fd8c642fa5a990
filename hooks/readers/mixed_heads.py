"""Reads mixture-of-head attention as it was released with MoH-DiT: softmax attention, each head times its gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.hooks.readers.registered import Mixing, ModuleRun, join_heads, reader
from workbench.hooks.readers.state_space import has
from workbench.kernels.composed import RowGatedPattern
from workbench.kernels.masks import Mask
from workbench.kernels.softmax import SoftmaxPattern


@reader(
    "MoHAttention", kind="self",
    when=has("qkv", "q_norm", "k_norm", "proj", "num_heads", "head_dim", "scale", "shared_head", "routed_head"),
)  # fmt: skip
def mixed_heads(run: ModuleRun) -> Mixing:
    """Gates lie between A·V and the projection, where the attention that the module calls does not show them."""
    module: Any = run.module
    x: Tensor = run.inputs["x"]
    b, n, _ = x.shape
    q, k, v = module.qkv.forward(x).view(b, n, 3, module.num_heads, module.head_dim).permute(2, 0, 3, 1, 4)
    q, k = module.q_norm.forward(q), module.k_norm.forward(k)
    base = SoftmaxPattern(q, k, Mask(n, n), scale=module.scale, values=v)

    def finish(z: Tensor) -> Tensor:
        out: Tensor = module.proj.forward(join_heads(z).to(x.dtype))
        return out

    gates = _gates(module, x).transpose(1, 2)
    return Mixing(RowGatedPattern(base, gates, values=v), v, finish, "gated", queries=q, keys=k)


def _gates(module: Any, x: Tensor) -> Tensor:
    """[batch, token, head], zero where the router skips a head; the first heads are shared."""
    n_shared, n_active = module.shared_head, module.routed_head
    shared = x.new_zeros(*x.shape[:2], 0)
    if n_shared:
        shared = module.wg_1.forward(x).softmax(-1) * n_shared
    if not n_active:
        return shared
    likes = module.wg.forward(x).softmax(-1)
    best = torch.zeros_like(likes).scatter_(-1, likes.topk(n_active, dim=-1).indices, 1.0)
    kept = likes * best
    routed = kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).eps) * n_active
    if n_shared:
        sides = 2 * module.wg_0.forward(x).softmax(-1)
        shared, routed = shared * sides[..., :1], routed * sides[..., 1:]
    return torch.cat([shared, routed], dim=-1)
