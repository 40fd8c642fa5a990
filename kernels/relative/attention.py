"""Attention with relative positions as a function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.kernels.checks import check_attention
from workbench.kernels.functions import attention_function
from workbench.kernels.relative.pattern import RelativePattern, check_relative, distances


@attention_function(RelativePattern)
def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    content_bias: Tensor,
    table: Tensor,
    table_bias: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · (q_i·k_j + u·k_j + q_i·r_δ + b_δ)) v with δ = j − i (arXiv 1901.02860, 2308.03429).

    Time and memory grow with the square of the length: the position terms are added as a bias.

    Args:
        q: [batch, head, query, d]; the queries are the last of the keys. k: [batch, head, key, d].
        v: [batch, head, key, width].
        content_bias, table, table_bias: u, r and b, see `RelativePattern`.
        causal: no key after the query is seen.
        scale: on all four terms; 1/√d if None.

    Returns:
        [batch, head, query, width].

    Raises:
        CaptureError: tensors that do not fit.

    >>> q = k = v = torch.ones(1, 2, 3, 4)
    >>> relative_attention(q, k, v, torch.zeros(2, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5)).shape
    torch.Size([1, 2, 3, 4])
    """
    check_attention(q, k, v)
    check_relative(q, k, content_bias, table, table_bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    apart = distances(q.shape[2], k.shape[2], q.device) - (k.shape[2] - q.shape[2])
    at = apart + (table.shape[1] - 1) // 2
    near = q @ table.mT
    bias = scale * (near.gather(3, at.expand(*near.shape[:2], -1, -1)) + table_bias[:, at])
    if causal:
        bias = bias.masked_fill(apart > 0, -torch.inf)
    return F.scaled_dot_product_attention(q + content_bias[:, None], k, v, attn_mask=bias, scale=scale)
