"""The map of attention with relative positions: scores of four parts, made tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention, check_number, check_tensor
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern

_ROWS = 128  # made at once where denominators are found


class RelativePattern(Pattern):
    """A = softmax(scale · (q_i·k_j + u·k_j + q_i·r_δ + b_δ)), δ the position of the key less that of the query.

    What is held grows with the length alone. `logits` gives the four parts apart.

    Args:
        q: [batch, head, query, d]; the queries are the last of the keys. k: [batch, head, key, d].
        content_bias: u, [head, d].
        table: r, [head, 2 · reach − 1, d], and table_bias: b, [head, 2 · reach − 1], for δ from 1 − reach to reach − 1.
        causal: no key after the query is seen.
        scale: 1/√d if None.
        values: [batch, head, key, width], kept for `value_weighted`; optional.

    Raises:
        CaptureError: sizes that do not fit, or keys further away than the tables reach.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        content_bias: Tensor,
        table: Tensor,
        table_bias: Tensor,
        *,
        causal: bool = True,
        scale: float | None = None,
        values: Tensor | None = None,
    ) -> None:
        check_relative(q, k, content_bias, table, table_bias)
        n_queries, n_keys = q.shape[2], k.shape[2]
        mask = Mask(n_queries, n_keys, causal=causal, offset=n_keys - n_queries)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        super().__init__((*q.shape[:2], n_queries, n_keys), mask, dtype, q.device)
        self.q, self.k, self.causal = q.detach(), k.detach(), causal
        self.content_bias, self.table, self.table_bias = (t.detach() for t in (content_bias, table, table_bias))
        self.scale = q.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)
        self.values = None if values is None else values.detach()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Whether it is causal, and the scale; queries, keys and tables, and the values where they are kept."""
        names = ("q", "k", "content_bias", "table", "table_bias", "values")
        held = {name: getattr(self, name) for name in names}
        return {"causal": self.causal, "scale": self.scale}, {n: t for n, t in held.items() if t is not None}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> RelativePattern:
        """The pattern from its `state`."""
        return cls(**tensors, **facts)

    def logits(
        self, queries: slice | None = None, keys: slice | None = None, heads: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """The scaled parts of the scores, [batch, head, q, k] each: their sum is what the softmax is of.

        Returns:
            "content" q·k, "content bias" u·k, "position" q·r, "position bias" b; of hidden keys too.
        """
        rows = slice(0, self.n_queries) if queries is None else queries
        columns = slice(0, self.n_keys) if keys is None else keys
        which = list(range(self.n_heads) if heads is None else self._checked(heads))
        q, k = self.q[:, which, rows].to(self.dtype), self.k[:, which, columns].to(self.dtype)
        u, table, bias = (t[which].to(self.dtype) for t in (self.content_bias, self.table, self.table_bias))
        first = (columns.start - self.mask.offset) - (rows.stop - 1)
        middle = (table.shape[1] - 1) // 2 + first
        span = q.shape[2] + k.shape[2] - 1
        at = distances(q.shape[2], k.shape[2], q.device) + q.shape[2] - 1
        near = q @ table[:, middle : middle + span].mT
        position = near.gather(3, at.expand(*near.shape[:2], -1, -1))
        parts = {
            "content": q @ k.mT,
            "content bias": (u[:, None] @ k.mT).expand(-1, -1, q.shape[2], -1),
            "position": position,
            "position bias": bias[:, middle : middle + span][:, at].expand(len(q), -1, -1, -1),
        }
        return {name: self.scale * part for name, part in parts.items()}

    def _scores(self, queries: slice, keys: slice, heads: Sequence[int] | None) -> Tensor:
        parts = self.logits(queries, keys, heads)
        scores = parts.pop("content")
        for part in parts.values():
            scores = scores + part
        rule = self.mask.rule(queries, keys, self.device)
        return scores if rule is None else scores.masked_fill(~rule, -torch.inf)

    @cached_property
    def lse(self) -> Tensor:
        """[batch, head, query] log of the softmax denominator."""
        whole = slice(0, self.n_keys)
        starts = range(0, self.n_queries, _ROWS)
        rows = (slice(start, min(start + _ROWS, self.n_queries)) for start in starts)
        return torch.cat([self._scores(each, whole, None).logsumexp(-1) for each in rows], dim=-1)

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A."""
        which = list(range(self.n_heads) if heads is None else self._checked(heads))
        if queries.stop <= queries.start or keys.stop <= keys.start:
            sizes = max(0, queries.stop - queries.start), max(0, keys.stop - keys.start)
            return self.q.new_zeros(self.n_batch, len(which), *sizes, dtype=self.dtype)
        return (self._scores(queries, keys, which) - self.lse[:, which, queries, None]).exp()


def distances(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """[query, key]: the key's number less the query's, both from the beginning of a tile."""
    return torch.arange(n_keys, device=device) - torch.arange(n_queries, device=device)[:, None]


def check_relative(q: Tensor, k: Tensor, content_bias: Tensor, table: Tensor, table_bias: Tensor) -> None:
    """Raise a CaptureError unless tables fit queries and keys, whose heads are as many."""
    check_attention(q, k)
    h, d, length = q.shape[1], q.shape[3], table.shape[1] if table.dim() == 3 else 0
    if k.shape[1] != h:
        raise CaptureError(f"there are {h} heads of queries and {k.shape[1]} of keys", hint="as many of both")
    check_tensor("content_bias", content_bias, (h, d), "head, d", q.device)
    check_tensor("table", table, (h, length, d), "head, distance, d", q.device)
    check_tensor("table_bias", table_bias, (h, length), "head, distance", q.device)
    if length % 2 == 0 or (length + 1) // 2 < k.shape[2] or q.shape[2] > k.shape[2]:
        raise CaptureError(
            f"tables of {length} distances do not reach over {k.shape[2]} keys and {q.shape[2]} queries",
            hint=f"2 · reach − 1 distances with a reach of {k.shape[2]} or more; queries are the last of the keys",
        )
