"""Relative attention in four parts: content, what a head likes of any key, distance by content, and distance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.kernels.checks import check_attention, check_tensor
from workbench.kernels.functions import attention_function
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern
from workbench.kernels.relative.scores import ScorePattern, by_distance, check_tables
from workbench.kernels.softmax import SoftmaxPattern


class RelativePattern(SoftmaxPattern):
    """A = softmax over j ≤ i of ((q_i + u)·k_j + q_i·R_δ + β_δ) / √d, δ = i − j; its four parts are its factors.

    Args: as of `relative_attention`; `lse` and `values` as of `SoftmaxPattern`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        likes: Tensor,
        table: Tensor,
        bias: Tensor,
        *,
        lse: Tensor | None = None,
        values: Tensor | None = None,
    ) -> None:
        _check(q, k, likes, table, bias)
        q, k, likes, table, bias = (t.detach() for t in (q, k, likes, table, bias))
        n_queries, n_keys = q.shape[2], k.shape[2]
        added = _added(q, table, bias, n_keys)
        mask = Mask(n_queries, n_keys, causal=True, offset=n_keys - n_queries, tensor=added)
        super().__init__(q + likes[:, None], k, mask, lse=lse, values=values)
        self.own, self.likes, self.table, self.bias = q, likes, table, bias

    @property
    def factors(self) -> Mapping[str, Pattern]:
        """The parts of the scores, whose sum the softmax is of: content, likes, distance by content, distance."""

        def part(**parts: Tensor) -> ScorePattern:
            return ScorePattern(self.shape, scale=self.scale, **parts)

        return {
            "content": part(q=self.own, k=self.k),
            "likes": part(q=self.likes[None, :, None], k=self.k),
            "distance by content": part(q=self.own, table=self.table),
            "distance": part(bias=self.bias),
        }

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What it was made of, and what is known of lse and values."""
        held = super().state()[1]
        known = {name: held[name] for name in ("lse", "values") if name in held}
        own = {"q": self.own, "k": self.k, "likes": self.likes, "table": self.table, "bias": self.bias}
        return {}, own | known

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> RelativePattern:
        """The pattern from its `state`."""
        own = (tensors[name] for name in ("q", "k", "likes", "table", "bias"))
        return cls(*own, lse=tensors.get("lse"), values=tensors.get("values"))


@attention_function(RelativePattern)
def relative_attention(q: Tensor, k: Tensor, v: Tensor, likes: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    """softmax(((q + u) kᵀ + q R_δ + β_δ) / √d) v over the keys up to each query (arXiv 1901.02860, 2308.03429).

    Args:
        q: [batch, head, query, d]; the queries are the last of the keys.
        k: [batch, kv head, key, d]; v: [batch, kv head, key, width].
        likes: u, [head, d]: what a head looks for in any key.
        table: R, [head, distance, d], of at least as many distances as keys. bias: β, [head, distance].

    Returns:
        [batch, head, query, width]. Time and memory grow with query · key.

    Raises:
        CaptureError: tensors that do not fit.

    >>> q = k = v = torch.ones(1, 2, 3, 4)
    >>> near = torch.tensor([0.0, -1e4, -1e4]).expand(2, 3)
    >>> v = torch.arange(3.0)[:, None].expand(1, 2, 3, 1)
    >>> relative_attention(q, k, v, torch.zeros(2, 4), torch.zeros(2, 3, 4), near)[0, 0, :, 0].tolist()
    [0.0, 1.0, 2.0]
    """
    check_attention(q, k, v)
    _check(q, k, likes, table, bias)
    n_queries, n_keys = q.shape[2], k.shape[2]
    hidden = ~torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
    added = _added(q, table, bias, n_keys).masked_fill(hidden, -torch.inf)
    return F.scaled_dot_product_attention(q + likes[:, None], k, v, added, enable_gqa=q.shape[1] != k.shape[1])


def _added(q: Tensor, table: Tensor, bias: Tensor, n_keys: int) -> Tensor:
    """[batch, head, query, key]: what is added to the scaled product of queries and keys."""
    i = torch.arange(n_keys - q.shape[2], n_keys, device=q.device)
    back = i[:, None] - torch.arange(n_keys, device=q.device)
    return by_distance((q @ table.mT + bias[:, None]) * q.shape[-1] ** -0.5, back)


def _check(q: Tensor, k: Tensor, likes: Tensor, table: Tensor, bias: Tensor) -> None:
    check_attention(q, k)
    check_tensor("likes", likes, (q.shape[1], q.shape[3]), "head, d", q.device)
    check_tables(table, bias, q.shape[1], k.shape[2], q.device, q.shape[3])
