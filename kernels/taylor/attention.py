"""Softmax attention with 1 + x + x²/2 in the place of eˣ, as a function and as a map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention, check_number
from workbench.kernels.functions import attention_function
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern

_CHUNK = 64


class TaylorPattern(Pattern):
    """A[i, j] = (1 + x + x²/2) / Σ of it over what query i sees, x = scale · q_i·k_j. Every weight is above zero.

    Args:
        q: [batch, head, position, d]; k: [batch, kv head, position, d].
        causal: no key after the query is seen.
        scale: 1/√d if None.
        values: [batch, kv head, position, width], kept for `value_weighted`; optional.

    Raises:
        CaptureError: tensors that do not fit, or queries and keys of different lengths.
    """

    def __init__(
        self, q: Tensor, k: Tensor, *, causal: bool = True, scale: float | None = None, values: Tensor | None = None
    ) -> None:
        _check(q, k)
        n = q.shape[2]
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        super().__init__((*q.shape[:2], n, n), Mask(n, n, causal=causal), dtype, q.device)
        self.n_kv_heads, self.causal = k.shape[1], causal
        self.q, self.k, self.values = q.detach(), k.detach(), None if values is None else values.detach()
        self.scale = q.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Whether it is causal, and the scale; q and k, and the values where they are kept."""
        held = {"q": self.q, "k": self.k, "values": self.values}
        return {"causal": self.causal, "scale": self.scale}, {n: t for n, t in held.items() if t is not None}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> TaylorPattern:
        """The pattern from its `state`."""
        return cls(
            tensors["q"], tensors["k"], causal=facts["causal"], scale=facts["scale"], values=tensors.get("values")
        )

    @cached_property
    def sums(self) -> Tensor:
        """[batch, head, query]: what the weights of a row are divided by."""
        q, k = self.q.to(self.dtype), self.k.to(self.dtype)
        return _sums(q, k, k.new_zeros(*k.shape[:3], 0), self.scale, self.causal)[..., 0]

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A."""
        which = list(range(self.n_heads) if heads is None else self._checked(heads))
        group = self.n_heads // self.n_kv_heads
        q = self.q[:, which, queries].to(self.dtype)
        k = self.k[:, [head // group for head in which], keys].to(self.dtype)
        weights = _series(self.scale * (q @ k.mT)) / self.sums[:, which, queries, None]
        rule = self.mask.rule(queries, keys, self.device)
        return weights if rule is None else weights.masked_fill(~rule, 0)


@attention_function(TaylorPattern)
def taylor_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """Attention with 1 + x + x²/2 in the place of eˣ, x = scale · q·k (arXiv 2402.18668, 2510.11602).

    Time and memory grow linearly with the length. One denominator for all three orders.

    Args:
        q: [batch, head, position, d]; k: [batch, kv head, position, d]; v: the same with its own width.
        causal: no key after the query is seen.
        scale: 1/√d if None.

    Returns:
        [batch, head, position, width].

    Raises:
        CaptureError: tensors that do not fit, or queries and keys of different lengths.

    >>> q = k = torch.zeros(1, 1, 2, 4)
    >>> taylor_attention(q, k, torch.tensor([[[[1.0], [3.0]]]])).flatten().tolist()
    [1.0, 2.0]
    """
    check_attention(q, k, v)
    _check(q, k)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sums = _sums(q.to(dtype), k.to(dtype), v.to(dtype), scale, causal)
    return (sums[..., :-1] / sums[..., -1:]).to(v.dtype)


def _series(x: Tensor) -> Tensor:
    return 1 + x + x.square() / 2


def _features(t: Tensor) -> Tensor:
    """[…, 1 + d + d²]: φ with φ(q)·φ(k) = 1 + q·k + (q·k)²/2."""
    squares = (t[..., :, None] * t[..., None, :]).flatten(-2) * 0.5**0.5
    return torch.cat((torch.ones_like(t[..., :1]), t, squares), dim=-1)


def _sums(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """[batch, head, position, width + 1]: Σ w·v and Σ w of each row, chunk after chunk of positions."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    v, q = torch.cat((v, torch.ones_like(k[..., :1])), dim=-1), q * scale
    if not causal:
        state = sum(_features(a).mT @ b for a, b in zip(k.split(_CHUNK, 2), v.split(_CHUNK, 2), strict=True))
        return torch.cat([_features(each) @ state for each in q.split(_CHUNK, 2)], dim=2)
    found, state = [], None
    for rows, keys, values in zip(*(t.split(_CHUNK, 2) for t in (q, k, v)), strict=True):
        own = _series(rows @ keys.mT).tril() @ values
        found.append(own if state is None else own + _features(rows) @ state)
        more = _features(keys).mT @ values
        state = more if state is None else state + more
    return torch.cat(found, dim=2)


def _check(q: Tensor, k: Tensor) -> None:
    check_attention(q, k)
    if q.shape[2] != k.shape[2]:
        raise CaptureError(f"rows are of one sequence, not of {q.shape[2]} queries and {k.shape[2]} keys")
