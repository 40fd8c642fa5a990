"""Reads sparse query attention of the package rxlm, which states the heads of the attention that it stands in for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.hooks.readers.registered import Mixing, ModuleRun, join_heads, reader
from workbench.hooks.readers.state_space import has
from workbench.hooks.tap import Unshown
from workbench.kernels.masks import Mask, as_four
from workbench.kernels.softmax import SoftmaxPattern


@reader(
    "rxlm.transformers.attention.SparseQueryAttention", kind="self",
    when=has("q_proj", "k_proj", "v_proj", "out_proj", "num_groups", "num_query_groups", "rel_embed", "is_causal"),
)  # fmt: skip
def sparse_queries(run: ModuleRun) -> Mixing:
    """Plain softmax attention of the queries that there are; where keys have more heads, queries are repeated."""
    module: Any = run.module
    if module.rel_embed or run.inputs.get("stm_kv_cache") is not None or run.inputs.get("use_self_attn_cache"):
        raise Unshown("relative embeddings and caches of this module are not read", site=run.site)
    given: Tensor = run.inputs["query"]
    b, t = given.shape[:2]
    q, k, v = module._forward_qkv(given, run.inputs["key"], run.inputs["value"], b, t)
    q, k = module._apply_rope(*module._apply_qk_norm(q, k))
    q = q.repeat(1, max(1, module.num_groups // module.num_query_groups), 1, 1)
    shown = None if module.is_causal else run.inputs.get("mask")
    mask = Mask(t, k.shape[2], causal=module.is_causal, tensor=None if shown is None else as_four(shown))

    def finish(z: Tensor) -> Tensor:
        y = join_heads(z).to(given.dtype)
        if module.use_gated_attention:
            y = y * module.gate_activation(module.gate_proj.forward(given))
        out: Tensor = module.out_proj.forward(y)
        return out

    return Mixing(SoftmaxPattern(q, k, mask, values=v), v, finish, "sdpa", queries=q, keys=k)
