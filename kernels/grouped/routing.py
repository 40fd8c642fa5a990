"""Attention inside clusters of queries and keys that lie near one centroid, balanced so that all have one size."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention, check_range
from workbench.kernels.functions import attention_function
from workbench.kernels.grouped.attention import group_weights
from workbench.kernels.grouped.pattern import GroupedPattern, apply_groups

_LAST_RESORT = -5e4


def clusters_of(x: Tensor, means: Tensor, size: int) -> Tensor:
    """[batch, head, cluster, size]: the positions that lie nearest to each centroid, in ascending order.

    All clusters have one size, so that a position may be in several, or in none.

    Args:
        x: [batch, head, position, d]; means: [head, cluster, d], both of length one. size: at most the positions.

    Raises:
        CaptureError: sizes that do not fit.

    >>> x = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]])
    >>> clusters_of(x, torch.eye(2)[None], 2).tolist()
    [[[[0, 2], [0, 1]]]]
    """
    if means.dim() != 3 or means.shape[0] != x.shape[1] or means.shape[2] != x.shape[3]:
        raise CaptureError(f"means must be [head {x.shape[1]}, cluster, {x.shape[3]}]", shape=means.shape)
    check_range("size of a cluster", size, 1, x.shape[2], hint="a cluster holds at most all positions")
    near = torch.einsum("bhnd,hcd->bhcn", x, means)
    return near.topk(size, dim=-1).indices.sort(-1).values


def _pattern(
    q: Tensor,
    k: Tensor,
    clusters: Tensor,
    key_clusters: Tensor | None = None,
    *,
    causal: bool = False,
    sees_self: bool = True,
    scale: float | None = None,
    eps: float = 1e-5,
) -> GroupedPattern:
    weights, rows, columns = _weights(q, k, clusters, key_clusters, causal, sees_self, scale, eps)
    return GroupedPattern(weights, rows, columns, q.shape[2], k.shape[2], causal=causal, chosen=True, normalised=False)


@attention_function(_pattern)
def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Tensor,
    key_clusters: Tensor | None = None,
    *,
    causal: bool = False,
    sees_self: bool = True,
    scale: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Softmax attention inside clusters; a query in several gets their mean (Routing Transformer, arXiv 2003.05997).

    Rows sum to n / (n + eps) for a query in n clusters, to zero where it is in none.

    Args:
        q: [batch, head, query, d]; k: [batch, head, key, d]; v: [batch, head, key, width].
        clusters: [batch, head, cluster, size] of queries, as `clusters_of` gives them.
        key_clusters: the same of keys; those of the queries if None.
        causal: no key after the query is seen. The clusters themselves depend on all positions, also later ones.
        sees_self: else a position sees itself only where it sees nothing else, as where queries are the keys.
        scale: factor on q kᵀ; 1/√d if None.
        eps: added to the number of clusters that a query is in.

    Returns:
        [batch, head, query, width].

    Raises:
        CaptureError: tensors that do not fit.

    >>> one = torch.ones(1, 1, 3, 2)
    >>> routing_attention(one, one, one, torch.tensor([[[[0, 1]]]]), eps=0)[0, 0, :, 0].tolist()
    [1.0, 1.0, 0.0]
    """
    check_attention(q, k, v)
    weights, rows, columns = _weights(q, k, clusters, key_clusters, causal, sees_self, scale, eps)
    return apply_groups(weights, v.to(weights.dtype), rows, columns, q.shape[2]).to(v.dtype)


def _weights(
    q: Tensor,
    k: Tensor,
    clusters: Tensor,
    key_clusters: Tensor | None,
    causal: bool,
    sees_self: bool,
    scale: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    columns = clusters if key_clusters is None else key_clusters
    for name, index in (("clusters", clusters), ("key_clusters", columns)):
        if index.dim() != 4 or index.shape[:2] != q.shape[:2] or index.shape[2] != clusters.shape[2]:
            raise CaptureError(f"{name} must be [{q.shape[0]}, {q.shape[1]}, cluster, size]", shape=index.shape)
    bias = None
    if not sees_self:
        itself = columns[..., None, :] == clusters[..., :, None]
        bias = torch.zeros_like(itself, dtype=q.dtype).masked_fill(itself, _LAST_RESORT)
    weights = group_weights(q, k, clusters, columns, scale=scale, bias=bias, causal=causal)
    return mean_of_groups(weights, clusters, q.shape[2], eps), clusters, columns


def mean_of_groups(weights: Tensor, rows: Tensor, n_queries: int, eps: float) -> Tensor:
    """Weights [batch, head, group, row, column] over n + eps for a query that is a row of n groups."""
    at = rows.flatten(2)
    count = torch.zeros(*at.shape[:2], n_queries, dtype=weights.dtype, device=at.device)
    count.scatter_add_(2, at, torch.ones_like(at, dtype=weights.dtype))
    return weights * (count + eps).reciprocal().gather(2, at).view(rows.shape)[..., None]
