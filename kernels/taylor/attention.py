"""Causal attention with 1 + s + s²/2 in the place of exp(s), divided by the sum of a row, or order by order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.checks import check_attention
from workbench.kernels.functions import attention_function
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern

_ROWS = 256


class TaylorPattern(Pattern):
    """A[i, j] = t(s_ij) / Σ_{l ≤ i} t(s_il), t(s) = 1 + s + s²/2 ≥ 1/2, s = q·k/√d.

    Args:
        q: [batch, head, query, d]; the queries are the last of the keys. k: [batch, kv head, key, d].
        apart: A is the sum of 1/n, s/Σs and s²/Σs², each order over its own sum: signed, and of rows that sum to 3.
        values: [batch, kv head, key, width], kept for `value_weighted`; optional.
    """

    def __init__(self, q: Tensor, k: Tensor, apart: bool = False, *, values: Tensor | None = None) -> None:
        check_attention(q, k)
        n_queries, n_keys = q.shape[2], k.shape[2]
        mask = Mask(n_queries, n_keys, causal=True, offset=n_keys - n_queries)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        super().__init__((*q.shape[:2], n_queries, n_keys), mask, dtype, q.device)
        self.n_kv_heads, self.apart = k.shape[1], apart
        self.q, self.k = q.detach(), k.detach()
        self.values = None if values is None else values.detach()
        self.signed, self.normalised = apart, not apart

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Whether orders are apart; q and k, and the values where they are kept."""
        values = {} if self.values is None else {"values": self.values}
        return {"apart": self.apart}, {"q": self.q, "k": self.k} | values

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> TaylorPattern:
        """The pattern from its `state`."""
        return cls(tensors["q"], tensors["k"], facts["apart"], values=tensors.get("values"))

    @cached_property
    def _sums(self) -> list[Tensor]:
        """[batch, head, query] of each order, or of all of them."""
        q, k = self.q.to(self.dtype), self.k.to(self.dtype)
        parts = [orders(q[:, :, at : at + _ROWS], k, at + self.mask.offset, self.apart) for at in self._starts]
        return [torch.cat(each, dim=2) for each in zip(*([t.sum(-1) for t in part] for part in parts), strict=True)]

    @property
    def _starts(self) -> range:
        return range(0, self.n_queries, _ROWS)

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A, in a fresh tensor."""
        which = list(range(self.n_heads)) if heads is None else self._checked(heads)
        group = self.n_heads // self.n_kv_heads
        q = self.q[:, which][:, :, queries].to(self.dtype)
        k = self.k[:, [head // group for head in which]][:, :, keys].to(self.dtype)
        first = self.mask.offset + queries.indices(self.n_queries)[0] - keys.indices(self.n_keys)[0]
        found = orders(q, k, first, self.apart)
        sums = (each[:, which][:, :, queries, None] for each in self._sums)
        whole = torch.zeros_like(found[0])
        for part, total in zip(found, sums, strict=True):
            whole += part / total
        return whole


def orders(q: Tensor, k: Tensor, first: int, apart: bool) -> list[Tensor]:
    """[batch, head, query, key] of 1, s and s², or of their sum 1 + s + s²/2; zero where a key is after its query.

    Args:
        first: the last key that the first query sees.
    """
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * q.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(first)
    parts = [torch.ones_like(scores), scores, scores.square()] if apart else [1 + scores + scores.square() / 2]
    return [part * seen for part in parts]


@attention_function(TaylorPattern)
def taylor_attention(q: Tensor, k: Tensor, v: Tensor, apart: bool = False) -> Tensor:
    """Causal attention with 1 + s + s²/2 in the place of exp(s), s = q·k/√d (arXiv 2510.11602).

    Args:
        q: [batch, head, query, d]; the queries are the last of the keys.
        k: [batch, kv head, key, d]; v: [batch, kv head, key, width].
        apart: each order is divided by its own sum over the keys, as that paper prints it; that of s may vanish.

    Returns:
        [batch, head, query, width]. Time and memory grow with query · key; as a recurrence over
        `kernels.systems.taylor_features` they would not.

    Raises:
        CaptureError: tensors that do not fit.

    >>> q = torch.zeros(1, 1, 2, 4)
    >>> taylor_attention(q, q, torch.tensor([[[[1.0], [3.0]]]]))[0, 0, :, 0].tolist()
    [1.0, 2.0]
    """
    check_attention(q, k, v)
    found = orders(q, k, k.shape[2] - q.shape[2], apart)
    weights = torch.stack([part / part.sum(-1, keepdim=True) for part in found]).sum(0)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
