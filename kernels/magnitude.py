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
from workbench.kernels.patterns import Pattern, RawMaker


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

    def _weighted(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        tile = self.base.tile_of(batch, queries, keys, heads)
        if self.key_weights is None:
            return tile
        return tile * self.key_weights[batch][:, list(heads), None, keys]

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k], not negative."""
        return self.tile_of(slice(None), queries, keys, range(self.n_heads) if heads is None else heads)

    def tile_of(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        """[b, h, q, k], not negative."""
        size = self._sums[0][batch][:, list(heads), queries, None]
        return self._weighted(batch, queries, keys, heads).abs() / size.clamp(min=torch.finfo(self.dtype).tiny)

    def raw_maker(self, batch: slice, heads: slice) -> RawMaker:
        """Tiles A·w."""
        which = range(self.n_heads)[heads]
        return lambda queries, keys: self._weighted(batch, queries, keys, which)

    @property
    def denominators_known(self) -> bool:
        """Whether the row sums were found already."""
        return "_sums" in self.__dict__

    def found_denominators(self, denominators: Tensor, signed: Tensor) -> None:
        """Keep the row sums."""
        self.__dict__["_sums"] = denominators.to(self.dtype), signed.to(self.dtype)

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """Σ |A|·w and Σ A·w per row, [batch, head, query]."""
        streaming.find_denominators(self)
        found: tuple[Tensor, Tensor] = self.__dict__["_sums"]
        return found

    @property
    def signed_mass(self) -> Tensor:
        """[batch, head, query] Σ A·w / Σ |A|·w; NaN in rows without weight."""
        size, signed = self._sums
        return torch.where(size > 0, signed / size, torch.nan)

    @property
    def seen(self) -> MaskSummary:
        """The base's counts; once the row sums are known, a row without weight counts as one that sees no key."""
        seen = self.base.seen
        if not self.denominators_known:
            return seen
        keys = torch.where(self._sums[0] > 0, seen.keys_per_query, 0)
        return MaskSummary(keys, seen.queries_per_key, seen.first_key)

    def check(self) -> None:
        """As the base does."""
        self.base.check()
