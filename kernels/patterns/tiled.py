"""Maps [batch, head, query, key] that are made tile by tile: any part is computed, the whole only if asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels import streaming
from workbench.kernels.mask_summary import MaskSummary
from workbench.kernels.masks import Mask
from workbench.kernels.plan import Pass
from workbench.kernels.source import RawTileMaker, TileMaker
from workbench.kernels.statistics import Options
from workbench.kernels.streaming import Denominators
from workbench.kernels.tile import Space

DENSE_LIMIT = 1 << 30
"""Bytes above which `dense` refuses unless told otherwise: 1 GiB."""


class Tiled(ABC):
    """A map whose tiles can be made: rows, the whole and products with values follow from them.

    Attributes:
        n_batch, n_heads, n_kv_heads, n_queries, n_keys: its sizes.
        mask: which keys each query may see.
        sinks: [head] logits that join the softmax's denominator only; None for none.
        dtype: of the tiles; float64 for float64 inputs, else float32.
        tile_scale: how many times as large as others its tiles may be: 2 where making one takes no tensors of its size.
    """

    tile_scale: int = 1
    n_kv_heads: int
    sinks: Tensor | None = None

    def __init__(self, shape: Sequence[int], mask: Mask, dtype: torch.dtype, device: torch.device) -> None:
        self.n_batch, self.n_heads, self.n_queries, self.n_keys = shape
        self.n_kv_heads = self.n_heads
        if self.n_heads < 1 or self.n_keys < 1:
            raise CaptureError("a map needs at least one head and one key", shape=self.shape)
        self.mask, self.dtype, self.device = mask, dtype, device
        mask.check_fits(self.shape, device)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        return self.n_batch, self.n_heads, self.n_queries, self.n_keys

    @property
    def head_group(self) -> int:
        """How many neighbouring heads share keys and layout, so that they are streamed together."""
        return self.mask.head_group(self.n_heads, self.n_kv_heads)

    @abstractmethod
    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of the pattern; all heads if None."""

    def tile_of(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        """[b, h, q, k] for these batch entries; families with costly tiles make no others."""
        return self.tile(queries, keys, heads)[batch]

    def maker(self, batch: slice, heads: slice, wants_log: bool) -> TileMaker:
        """A function that makes (p, log₂ p or None) of a tile for these batch entries and heads."""
        which = range(self.n_heads)[heads]

        def make(queries: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
            p = self.tile_of(batch, queries, keys, which)
            return p, p.log2().clamp_(min=-1e30) if wants_log else None

        return make

    def raw_maker(self, batch: slice, heads: slice) -> RawTileMaker:
        """A function that makes tiles before normalisation: masked scores, or weights that may be negative."""
        raise CaptureError(f"{type(self).__name__} is normalised as it is")

    @property
    def denominators_known(self) -> bool:
        """Whether tiles can be normalised without a pass that finds each row's denominator first."""
        return True

    def found_denominators(self, found: Denominators) -> None:
        """Take what a pass has found of each row."""
        raise CaptureError(f"{type(self).__name__} is normalised as it is")

    def collect(self, each: Pass, options: Options) -> dict[str, Tensor]:
        """The raw sums of one pass over the tiles."""
        raw, found = streaming.collect(self, each, options)
        if found is not None:
            self.found_denominators(found)
        return raw

    @property
    def has_scores(self) -> bool:
        """Whether the pattern is a softmax of scores."""
        return False

    @property
    def seen(self) -> MaskSummary:
        """What the mask lets through, counted per query and per key."""
        return self.mask.summary(self.device)

    def space(self) -> Space:
        """Sizes and mask counts, for the accumulators."""
        return Space(*self.shape, self.mask, self.seen, self.device, self.dtype)

    def rows(self, queries: int | slice | Sequence[int], heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, len(queries), key]: whole rows, for one query, a slice or a list."""
        if isinstance(queries, slice):
            wanted: list[int] = list(range(*queries.indices(self.n_queries)))
        else:
            wanted = [queries] if isinstance(queries, int) else list(queries)
        bad = [i for i in wanted if not -self.n_queries <= i < self.n_queries]
        if bad:
            raise CaptureError(f"there are {self.n_queries} queries, no query {bad[0]}")
        parts = [self.tile(slice(i, i + 1), slice(0, self.n_keys), heads) for i in (i % self.n_queries for i in wanted)]
        return torch.cat(parts, dim=2) if parts else self.tile(slice(0, 0), slice(0, self.n_keys), heads)

    def dense(self, heads: Sequence[int] | None = None, limit: int | None = DENSE_LIMIT) -> Tensor:
        """The whole map [batch, head, query, key] of some heads (all if None).

        Raises:
            CaptureError: it would hold more than `limit` bytes (None: no limit); the message says how many.
        """
        which = range(self.n_heads) if heads is None else self._checked(heads)
        size = self.n_batch * len(which) * self.n_queries * self.n_keys * self.dtype.itemsize
        if limit is not None and size > limit:
            raise CaptureError(
                f"the dense pattern would take {size:,} bytes, the limit is {limit:,}",
                shape=(self.n_batch, len(which), self.n_queries, self.n_keys),
                hint="ask for fewer heads, for rows(...), for a pooled statistic, or pass a larger limit=",
            )
        return self.tile(slice(0, self.n_queries), slice(0, self.n_keys), list(which))

    def _checked(self, heads: Iterable[int]) -> list[int]:
        heads = list(heads)
        bad = [h for h in heads if not -self.n_heads <= h < self.n_heads]
        if bad:
            raise CaptureError(f"there are {self.n_heads} heads, no head {bad[0]}")
        return [h % self.n_heads for h in heads]

    def apply(self, values: Tensor) -> Tensor:
        """A·V, [batch, head, query, width], for values [batch, head or kv head, key, width], tile by tile."""
        v = self._checked_values(values)
        out = torch.zeros(*self.shape[:3], v.shape[-1], dtype=self.dtype, device=self.device)
        for tile in streaming.tiles(self):
            out[tile.rows] += tile.p @ v[tile.batch, tile.heads, tile.keys]
        return out

    def _checked_values(self, values: Tensor) -> Tensor:
        """[batch, head, key, width] in the pattern's dtype."""
        fits = values.dim() == 4 and values.shape[0] == self.n_batch and values.shape[2] == self.n_keys
        if not fits or self.n_heads % values.shape[1]:
            raise CaptureError(
                f"values must be [batch {self.n_batch}, head, key {self.n_keys}, width]", shape=values.shape
            )
        return values.to(self.dtype).repeat_interleave(self.n_heads // values.shape[1], dim=1)
