"""Lazy attention patterns: maps A [batch, head, query, key] of which any part can be had, the whole only if asked.

A mechanism is a subclass with a `tile`; statistics, views and analyses follow from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels import streaming
from workbench.kernels.checks import check_finite
from workbench.kernels.masks import Mask, MaskSummary
from workbench.kernels.plan import Pass
from workbench.kernels.statistics import Options
from workbench.kernels.tile import Space

Grade = Literal["exact", "frozen", "surrogate"]
Maker = Callable[[slice, slice], tuple[Tensor, Tensor | None]]
RawMaker = Callable[[slice, slice], Tensor]
DENSE_LIMIT = 1 << 30
"""Bytes above which `dense` refuses unless told otherwise: 1 GiB."""


class Pattern(ABC):
    """A map A with out = A·V.

    Attributes:
        n_batch, n_heads, n_kv_heads, n_queries, n_keys: its sizes.
        mask: which keys each query may see.
        grade: "exact" (the model's own weights), "frozen" (exact at fixed gates) or "surrogate".
        signed: whether entries may be negative.
        normalised: whether rows sum to one.
        by_magnitude: whether statistics are those of |A|, normalised per row: so for signed and unnormalised patterns.
        sinks: [head] logits that join the softmax's denominator only; None for none.
        values: [batch, kv head, key, width], for value-weighted statistics; None if they were not kept.
        dtype: of the tiles; float64 for float64 inputs, else float32.
        tile_scale: how many times as large as others its tiles may be: 2 where making one takes no tensors of its size.
    """

    grade: Grade = "exact"
    signed: bool = False
    normalised: bool = True
    tile_scale: int = 1
    n_kv_heads: int
    values: Tensor | None = None
    sinks: Tensor | None = None

    def __init__(self, shape: Sequence[int], mask: Mask, dtype: torch.dtype, device: torch.device) -> None:
        self.n_batch, self.n_heads, self.n_queries, self.n_keys = shape
        self.n_kv_heads = self.n_heads
        self.mask, self.dtype, self.device = mask, dtype, device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        return self.n_batch, self.n_heads, self.n_queries, self.n_keys

    @property
    def head_group(self) -> int:
        """How many neighbouring heads share keys and layout, so that they are streamed together."""
        layouts = 1 if self.mask.layout is None else self.mask.layout.n_layouts
        return self.n_heads // max(self.n_kv_heads, layouts)

    @property
    def by_magnitude(self) -> bool:
        """Whether statistics are those of |A| normalised per row."""
        return self.signed or not self.normalised

    @abstractmethod
    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON facts and named tensors from which `rebuild` makes the pattern again; "values" where they are kept."""

    @classmethod
    @abstractmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Pattern:
        """The pattern from its `parts`."""

    def kept(self, keep: Callable[[str, Tensor], Tensor]) -> Pattern:
        """The same pattern on tensors that `keep(name, tensor)` made of its own."""
        facts, tensors = self.parts()
        return self.rebuild(facts, {name: keep(name, tensor) for name, tensor in tensors.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held."""
        return sum(t.untyped_storage().nbytes() for t in self.parts()[1].values())

    @abstractmethod
    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of the pattern; all heads if None."""

    def tile_of(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        """[b, h, q, k] for these batch entries; families whose tiles are dear make no others."""
        return self.tile(queries, keys, heads)[batch]

    def maker(self, batch: slice, heads: slice, wants_log: bool) -> Maker:
        """A function that makes (p, log₂ p or None) of a tile for these batch entries and heads."""
        which = range(self.n_heads)[heads]

        def make(queries: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
            p = self.tile_of(batch, queries, keys, which)
            return p, p.log2().clamp_(min=-1e30) if wants_log else None

        return make

    def raw_maker(self, batch: slice, heads: slice) -> RawMaker:
        """A function that makes tiles before normalisation: masked scores, or weights that may be negative."""
        raise CaptureError(f"{type(self).__name__} is normalised as it is")

    @property
    def denominators_known(self) -> bool:
        """Whether tiles can be normalised without a pass that finds each row's denominator first."""
        return True

    def found_denominators(self, denominators: Tensor, signed: Tensor) -> None:
        """Take what a pass has found, [batch, head, query]: the lse of scores, or Σ |A| and Σ A."""
        raise CaptureError(f"{type(self).__name__} is normalised as it is")

    def fused_pass(self, each: Pass, options: Options) -> dict[str, Tensor] | None:
        """The raw sums of one pass from a kernel that is faster than plain torch; None if there is none."""
        return None

    def engine(self, names: Sequence[str], options: Options) -> str:
        """What streams these statistics in one pass: "torch", "native" (C++) or "triton"."""
        return "torch"

    @property
    def has_scores(self) -> bool:
        """Whether the pattern is a softmax of scores."""
        return False

    def check(self) -> None:
        """Raise a CaptureError that names the first NaN or inf among the pattern's tensors."""
        for name, tensor in self.parts()[1].items():
            if name in ("q", "k", "weights"):
                check_finite(name, tensor)

    @property
    def lse(self) -> Tensor:
        """[batch, head, query] log of the softmax denominator; only softmax patterns have one."""
        raise CaptureError(f"{type(self).__name__} has no scores, hence no lse")

    def magnitude(self, key_weights: Tensor | None = None) -> Pattern:
        """|A|, times [batch, head, key] weights if given, normalised per row."""
        from workbench.kernels.magnitude import MagnitudePattern

        return MagnitudePattern(self, key_weights)

    def value_weighted(self) -> Pattern:
        """The pattern |A|·‖v‖, normalised per row (Kobayashi et al. 2020).

        Raises:
            CaptureError: the pattern was made without values.
        """
        return self.magnitude(self.value_norms())

    def value_norms(self) -> Tensor:
        """[batch, head, key] Euclidean norms of the values, in the pattern's dtype."""
        if self.values is None:
            raise CaptureError("value-weighted statistics need the values", hint="capture with values=True")
        return self.values.to(self.dtype).norm(dim=-1).repeat_interleave(self.n_heads // self.values.shape[1], dim=1)

    @property
    def signed_mass(self) -> Tensor:
        """[batch, head, query] Σ A / Σ |A|, from −1 to 1; NaN in rows without weight."""
        if not self.by_magnitude:
            return self.space().alive(self.space().per_query(1.0))
        return self.magnitude().signed_mass

    @cached_property
    def seen(self) -> MaskSummary:
        """What the mask lets through, counted per query and per key."""
        return self.mask.summary(self.device)

    def space(self) -> Space:
        """Sizes and mask counts, for the accumulators."""
        return Space(*self.shape, self.mask.offset, self.device, self.dtype, self.seen, self.mask.causal)

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
        fits = values.dim() == 4 and values.shape[0] == self.n_batch and values.shape[2] == self.n_keys
        if not fits or self.n_heads % values.shape[1]:
            raise CaptureError(
                f"values must be [batch {self.n_batch}, head, key {self.n_keys}, width]", shape=values.shape
            )
        v = values.to(self.dtype).repeat_interleave(self.n_heads // values.shape[1], dim=1)
        out = torch.zeros(*self.shape[:3], v.shape[-1], dtype=self.dtype, device=self.device)
        for tile in streaming.tiles(self):
            out[tile.rows] += tile.p @ v[tile.batch, tile.heads, tile.keys]
        return out

    def statistics(
        self,
        names: Sequence[str],
        *,
        tokens: Tensor | None = None,
        sink_keys: Sequence[int] | None = None,
        n_top: int = 8,
        block: int = 16,
    ) -> dict[str, Tensor]:
        """Stream statistics of the pattern (see `workbench.kernels.statistics` for their definitions).

        >>> DensePattern(torch.eye(3).expand(1, 1, 3, 3)).statistics(["received"])["received"].tolist()
        [[[1.0, 1.0, 1.0]]]
        """
        keys = None if sink_keys is None else tuple(sink_keys)
        return streaming.statistics(self, names, Options(tokens, keys, n_top, block))

    def __repr__(self) -> str:
        b, h, q, k = self.shape
        kind = "signed" if self.signed else "normalised" if self.normalised else "unnormalised"
        marks = f"{kind}, grade={self.grade!r}"
        return f"{type(self).__name__}(batch={b}, heads={h}, queries={q}, keys={k}, {marks})"


class DensePattern(Pattern):
    """A pattern that is held whole, for weights that a model computed itself, and for tests.

    Args:
        weights: [batch, head, query, key], at least zero.
        mask: what may be seen; all of it if None.
        normalised: whether rows sum to one. Statistics are those of the weights as they are, also where they do not.
    """

    def __init__(self, weights: Tensor, mask: Mask | None = None, normalised: bool = True) -> None:
        dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
        mask = mask or Mask(weights.shape[-2], weights.shape[-1])
        super().__init__(weights.shape, mask, dtype, weights.device)
        self.weights, self.normalised = weights, normalised

    @property
    def by_magnitude(self) -> bool:
        """False: what a row lacks of one means something."""
        return False

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The weights, and the rules of the mask."""
        facts, tensors = self.mask.parts()
        held = tensors if self.values is None else tensors | {"values": self.values}
        return {"mask": facts, "normalised": self.normalised}, {"weights": self.weights} | held

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> DensePattern:
        """The pattern from its `parts`."""
        pattern = cls(tensors["weights"], Mask.rebuild(facts["mask"], tensors), facts["normalised"])
        pattern.values = tensors.get("values")
        return pattern

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of the stored weights."""
        part = self.weights if heads is None else self.weights[:, list(heads)]
        return part[:, :, queries, keys].to(self.dtype)
