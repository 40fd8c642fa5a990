"""|A| normalised per row: what statistics and views of signed or unnormalised patterns speak of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels import streaming
from workbench.kernels.masks import MaskSummary
from workbench.kernels.patterns import Pattern


class MagnitudePattern(Pattern):
    """|A| · w / Σ |A| · w, where w are weights of the keys.

    Args:
        base: the pattern A.
        key_weights: [batch, head, key], at least zero; None for one.
    """

    def __init__(self, base: Pattern, key_weights: Tensor | None = None) -> None:
        super().__init__(base.shape, base.mask, base.dtype, base.device)
        self.base, self.key_weights = base, key_weights
        self.n_kv_heads, self.grade, self.values = base.n_kv_heads, base.grade, base.values

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """None of its own."""
        raise CaptureError("a pattern of magnitudes is made from another", hint="keep that one, and call magnitude()")

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> MagnitudePattern:
        """Not possible: see `parts`."""
        raise CaptureError("a pattern of magnitudes is made from another", hint="rebuild that one")

    def _weighted(self, queries: slice, keys: slice, heads: Sequence[int] | None) -> Tensor:
        tile = self.base.tile(queries, keys, heads)
        if self.key_weights is None:
            return tile
        weights = self.key_weights if heads is None else self.key_weights[:, list(heads)]
        return tile * weights[:, :, None, keys]

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k], not negative."""
        tile = self._weighted(queries, keys, heads).abs()
        total = self._sums[0] if heads is None else self._sums[0][:, list(heads)]
        return tile / total[:, :, queries, None].clamp(min=torch.finfo(self.dtype).tiny)

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """Σ |A|·w and Σ A·w per row, [batch, head, query]."""
        size, signed = (torch.zeros(self.shape[:3], dtype=torch.float64, device=self.device) for _ in range(2))
        for queries, keys in streaming.rectangles(self):
            tile = self._weighted(queries, keys, None)
            signed[:, :, queries] += tile.sum(-1)
            size[:, :, queries] += tile.abs_().sum(-1)
        return size.to(self.dtype), signed.to(self.dtype)

    @property
    def signed_mass(self) -> Tensor:
        """[batch, head, query] Σ A·w / Σ |A|·w; NaN in rows without weight."""
        size, signed = self._sums
        return torch.where(size > 0, signed / size, torch.nan)

    @cached_property
    def seen(self) -> MaskSummary:
        """The base's counts; a row whose weights are all zero counts as one that sees no key."""
        seen = self.base.seen
        keys = torch.where(self._sums[0] > 0, seen.keys_per_query, 0)
        return MaskSummary(keys, seen.queries_per_key, seen.first_key)
