"""Agent attention as a function: a few agents read all keys, and all queries read the agents."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention
from workbench.kernels.composed.product import ComposedPattern
from workbench.kernels.functions import attention_function
from workbench.kernels.masks import Mask
from workbench.kernels.softmax import SoftmaxPattern


def _pattern(
    q: Tensor,
    k: Tensor,
    agents: Tensor,
    *,
    aggregate_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
    scale: float | None = None,
) -> ComposedPattern:
    _check(q, k, agents)

    def factor(rows: Tensor, keys: Tensor, bias: Tensor | None) -> SoftmaxPattern:
        bias = None if bias is None else bias.detach().expand(-1, -1, rows.shape[2], keys.shape[2])
        return SoftmaxPattern(rows, keys, Mask(rows.shape[2], keys.shape[2], tensor=bias), scale=scale)

    return ComposedPattern(
        {"broadcast": factor(q, agents, broadcast_bias), "aggregate": factor(agents, k, aggregate_bias)}
    )


@attention_function(_pattern)
def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    aggregate_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q aᵀ + B₂) · softmax(a kᵀ + B₁) v of n agents a, linear in the length (arXiv 2312.08874).

    Args:
        q: [batch, head, query, d]; k: [batch, kv head, key, d]; v: [batch, kv head, key, width].
        agents: a, [batch, head, agent, d].
        aggregate_bias: B₁, [1 or batch, 1 or head, agent, key], added to the scaled scores; None for none.
        broadcast_bias: B₂, [1 or batch, 1 or head, query, agent].
        scale: factor on both products; 1/√d if None.

    Returns:
        [batch, head, query, width].

    Raises:
        CaptureError: tensors that do not fit.

    >>> import torch
    >>> agent_attention(*torch.ones(3, 1, 2, 5, 4), torch.ones(1, 2, 3, 4)).shape
    torch.Size([1, 2, 5, 4])
    """
    _check(q, k, agents, v)
    shared = q.shape[1] != k.shape[1]
    gathered = F.scaled_dot_product_attention(agents, k, v, attn_mask=aggregate_bias, scale=scale, enable_gqa=shared)
    return F.scaled_dot_product_attention(q, agents, gathered, attn_mask=broadcast_bias, scale=scale)


def _check(q: Tensor, k: Tensor, agents: Tensor, v: Tensor | None = None) -> None:
    check_attention(q, k, v)
    if agents.dim() != 4 or agents.shape[:2] != q.shape[:2] or agents.shape[3] != q.shape[3] or not agents.shape[2]:
        b, h, _, d = q.shape
        raise CaptureError(f"agents must be [{b}, {h}, agent, {d}]", shape=agents.shape)
