"""The map of linear attention that sees every position: products of features, tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention, check_finite
from workbench.kernels.history import own
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern


class LinearPattern(Pattern):
    """A[i, j] = φ_i·ψ_j / η_i for features of queries and keys, over all positions (arXiv 2006.16236, 1812.01243).

    Where features are not negative, η is usually their row's sum, and rows sum to one. Sizes grow with the length
    alone, and `apply` runs in linear time. Causal linear attention is a `RecurrentPattern`.

    Args:
        q: φ, [batch, head, query, d]. k: ψ, [batch, kv head, key, d].
        eta: η, [batch, head, query]; None for one.
        values: [batch, kv head, key, width], kept for `value_weighted`; optional.
        normalised: whether rows sum to one. Features that may be negative make a map that is signed.

    Raises:
        CaptureError: sizes that do not fit, inputs that are not finite, an η of zero.

    >>> one = torch.ones(1, 1, 2, 1)
    >>> LinearPattern(one, one, torch.full((1, 1, 2), 2.0), normalised=True).dense()[0, 0].tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        eta: Tensor | None = None,
        *,
        values: Tensor | None = None,
        normalised: bool = False,
    ) -> None:
        check_attention(q, k)
        if eta is not None:
            if eta.shape != q.shape[:3]:
                raise CaptureError(f"eta must be {list(q.shape[:3])} [batch, head, query]", shape=eta.shape)
            check_finite("eta", eta)
            if bool((eta == 0).any()):
                raise CaptureError("an eta is zero, where rows are divided by it", shape=eta.shape)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        n_queries, n_keys = q.shape[2], k.shape[2]
        super().__init__((*q.shape[:2], n_queries, n_keys), Mask(n_queries, n_keys), dtype, q.device)
        self.n_kv_heads = k.shape[1]
        self.q, self.k = own(q), own(k)
        self.eta = None if eta is None else own(eta)
        self.values = None if values is None else own(values)
        self.normalised = normalised
        self.signed = not (bool((self.q >= 0).all()) and bool((self.k >= 0).all()))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Whether rows sum to one; q and k, and eta and values where there are any."""
        held = {"q": self.q, "k": self.k, "eta": self.eta, "values": self.values}
        return {"normalised": self.normalised}, {name: t for name, t in held.items() if t is not None}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> LinearPattern:
        """The pattern from its `state`."""
        optional = {name: tensors.get(name) for name in ("eta", "values")}
        return cls(tensors["q"], tensors["k"], normalised=facts["normalised"], **optional)

    def _of_head(self, t: Tensor) -> Tensor:
        return t.to(self.dtype).repeat_interleave(self.n_heads // t.shape[1], dim=1)

    def _divided(self, rows: Tensor, queries: slice, heads: Sequence[int]) -> Tensor:
        return rows if self.eta is None else rows / self.eta[:, list(heads), queries, None].to(self.dtype)

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A, in a fresh tensor."""
        which = list(range(self.n_heads)) if heads is None else self._checked(heads)
        group = self.n_heads // self.n_kv_heads
        q = self.q[:, :, queries][:, which].to(self.dtype)
        k = self.k[:, :, keys][:, [head // group for head in which]].to(self.dtype)
        return self._divided(q @ k.mT, queries, which)

    def apply(self, values: Tensor) -> Tensor:
        """A·V, [batch, head, query, width], in linear time; see `Pattern.apply`."""
        mixed = self._of_head(self.q) @ (self._of_head(self.k).mT @ self._checked_values(values))
        return self._divided(mixed, slice(0, self.n_queries), range(self.n_heads))
