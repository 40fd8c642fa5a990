"""A map whose rows are weighted, one number for each head and query: heads that are chosen, gated or skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention, check_finite, check_tensor
from workbench.kernels.composed.nested import put_together, taken_apart
from workbench.kernels.functions import attention_function
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern
from workbench.kernels.softmax import SoftmaxPattern


class RowGatedPattern(Pattern):
    """A[h, i, j] = g[h, i] · P[h, i, j]. A row whose gate is zero is a head that is skipped there.

    Statistics are those of the rows that are left, normalised; a row of zeros counts as one that sees no key.

    Args:
        base: P; it is in `factors` as "attention".
        gates: g, [batch, head, query].
        values: [batch, kv head, key, width], kept for `value_weighted`; optional.

    Raises:
        CaptureError: gates of another shape, or not finite.
    """

    normalised = False
    gates: Tensor

    def __init__(self, base: Pattern, gates: Tensor, *, values: Tensor | None = None) -> None:
        check_tensor("gates", gates, base.shape[:3], "batch, head, query", base.device)
        check_finite("gates", gates)
        super().__init__(base.shape, base.mask, base.dtype, base.device)
        self.base, self.gates = base, gates.detach()
        self.n_kv_heads, self.grade = base.n_kv_heads, base.grade
        self.signed = base.signed or bool((self.gates < 0).any())
        self.values = None if values is None else values.detach()

    @property
    def factors(self) -> Mapping[str, Pattern]:
        """The map without its gates."""
        return {"attention": self.base}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Family and facts of the map without gates; its tensors, the gates, and the values where they are kept."""
        facts, tensors = taken_apart(self.factors)
        held = {"gates": self.gates, "values": self.values}
        return {"base": facts}, tensors | {name: t for name, t in held.items() if t is not None}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> RowGatedPattern:
        """The pattern from its `state`."""
        base = put_together(facts["base"], tensors)["attention"]
        return cls(base, tensors["gates"], values=tensors.get("values"))

    def check(self) -> None:
        """As the map without gates does."""
        self.base.check()

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A."""
        which = range(self.n_heads) if heads is None else self._checked(heads)
        return self.tile_of(slice(None), queries, keys, which)

    def tile_of(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        """[b, h, q, k] for these batch entries."""
        gates = self.gates[batch, :, queries][:, list(heads), :, None].to(self.dtype)
        return self.base.tile_of(batch, queries, keys, heads) * gates

    @property
    def row_sum(self) -> Tensor:
        """[batch, head, query]: what P's rows add up to, times their gates."""
        return self.base.row_sum * self.gates.to(self.dtype)

    def ungated(self, values: Tensor) -> Tensor:
        """P·V, [batch, head, query, width]."""
        return self.base.apply(values)

    def apply(self, values: Tensor) -> Tensor:
        """A·V, [batch, head, query, width]."""
        return self.ungated(values) * self.gates[..., None].to(self.dtype)


def _pattern(
    q: Tensor, k: Tensor, gates: Tensor, *, causal: bool = False, scale: float | None = None
) -> RowGatedPattern:
    n_queries, n_keys = q.shape[2], k.shape[2]
    mask = Mask(n_queries, n_keys, causal=causal, offset=n_keys - n_queries)
    return RowGatedPattern(SoftmaxPattern(q, k, mask, scale=scale), gates)


@attention_function(_pattern)
def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Softmax attention whose heads are weighted at every query: g · softmax(q kᵀ / √d) v (MoH, arXiv 2410.11842).

    Args:
        q: [batch, head, query, d]; in the causal form the queries are the last of the keys.
        k: [batch, kv head, key, d]; v: [batch, kv head, key, width].
        gates: [batch, head, query]; zero where a head is skipped.
        scale: factor on q kᵀ; 1/√d if None.

    Returns:
        [batch, head, query, width].

    Raises:
        CaptureError: tensors that do not fit.

    >>> q = k = v = torch.ones(1, 2, 3, 4)
    >>> gated_attention(q, k, v, torch.tensor([[[1.0] * 3, [0.0] * 3]]))[0, :, 0, 0].tolist()
    [1.0, 0.0]
    """
    check_attention(q, k, v)
    if gates.shape != q.shape[:3]:
        raise CaptureError(f"gates must be {list(q.shape[:3])} [batch, head, query]", shape=gates.shape)
    mask, n = None, k.shape[2]
    if causal and q.shape[2] != n:
        mask = torch.ones(q.shape[2], n, dtype=torch.bool, device=q.device).tril(n - q.shape[2])
    z = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return z * gates[..., None].to(z.dtype)
