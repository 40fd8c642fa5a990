"""Reads the clusters of the package routing-transformer: a query in several gets their mean, one in none gets zeros."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import has
from workbench.hooks.tap import Unshown
from workbench.kernels.grouped import GroupedPattern, clusters_of, group_weights, mean_of_groups

_EPS, _LAST_RESORT = 1e-5, -5e4


@reader(
    "routing_transformer.routing_transformer.KmeansAttention", kind="self",
    when=has("kmeans", "window_size", "mem_key", "mem_value", "shared_qk", "num_mem_kv"),
)  # fmt: skip
def routing(run: ModuleRun) -> Mixing:
    """Learned keys that belong to a cluster are the last keys of the map."""
    module: Any = run.module
    if any(run.inputs.get(name) is not None for name in ("query_mask", "key_mask")):
        raise Unshown("tokens are masked, and clusters hold them all the same", site=run.site, hint="pass no mask")
    q, k, v = (run.inputs[name] for name in "qkv")
    rows, columns, k = _clusters(module, q, k)
    n, (_, n_clusters, memories, _) = k.shape[2], module.mem_key.shape
    learned = torch.arange(n, n + n_clusters * memories, device=q.device).view(1, 1, n_clusters, memories)
    columns = torch.cat((learned.expand(*columns.shape[:2], -1, -1), columns), dim=-1)
    k, v = (
        torch.cat((t, more.flatten(1, 2).expand(len(t), -1, -1, -1).to(t)), dim=2)
        for t, more in ((k, module.mem_key), (v, module.mem_value))
    )
    place, token = rows[..., :, None], columns[..., None, :]
    hidden = (token > place) & (token < n) if module.causal else None
    bias = torch.zeros_like(place == token, dtype=q.dtype).masked_fill(place == token, _LAST_RESORT)
    weights = group_weights(q, k, rows, columns, bias=bias if module.shared_qk else None, hidden=hidden)
    pattern = GroupedPattern(
        mean_of_groups(weights, rows, q.shape[2], _EPS), rows, columns, q.shape[2], k.shape[2],
        causal=module.causal and not memories, chosen=True, normalised=False, values=v,
    )  # fmt: skip
    return Mixing(pattern, v, lambda z: z.to(q.dtype), "routing", queries=q, keys=k)


def _clusters(module: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters of queries and of keys, and the keys as they are compared."""
    means = module.kmeans.means.to(q)
    rows = clusters_of(F.normalize(q, dim=-1), means, min(module.window_size, q.shape[2]))
    if module.shared_qk and not module.receives_context:
        return rows, rows, F.normalize(k, dim=-1).to(q)
    size = module.context_window_size if module.receives_context else module.window_size
    return rows, clusters_of(F.normalize(k, dim=-1), means, min(size, k.shape[2])), k
