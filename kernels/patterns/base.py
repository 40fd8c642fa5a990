"""Lazy attention patterns: maps A with out = A·V, of weights or signed, and their magnitudes.

A mechanism is a subclass with a `tile`; statistics, views and analyses follow from it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels import streaming
from workbench.kernels.checks import ask_later, check_finite
from workbench.kernels.mask_summary import MaskSummary
from workbench.kernels.masks import Mask
from workbench.kernels.patterns.tiled import Tiled
from workbench.kernels.plan import Pass
from workbench.kernels.source import FusedMagnitudes, RawTileMaker
from workbench.kernels.statistics import Options
from workbench.kernels.streaming import Denominators
from workbench.kernels.tile import Space

Grade = Literal["exact", "frozen", "surrogate"]

FAMILIES: dict[str, dict[tuple[str, str], type[Pattern]]] = {}
"""Every subclass of `Pattern` by its name, and by module and qualified name where several share one."""


class Pattern(Tiled):
    """A map A [batch, head, query, key] with out = A·V; sizes, mask and tiles are those of `Tiled`.

    Attributes:
        grade: "exact" (the model's own weights), "frozen" (exact at fixed gates) or "surrogate".
        signed: whether entries may be negative.
        normalised: whether rows sum to one.
        by_magnitude: whether statistics are those of |A|, normalised per row: so for signed and unnormalised patterns.
        values: [batch, kv head, key, width], for value-weighted statistics; None if they were not kept.
        gates: [batch, head, query] factors that its rows are multiplied with; None where there are none.
        before: [batch, head, query, width] that the rows read, beside A·V, of a state which was there before the first
            key; None where there was none.
    """

    grade: Grade = "exact"
    signed: bool = False
    normalised: bool = True
    before: Tensor | None = None
    gates: Tensor | None = None
    position_axes: ClassVar[Mapping[str, int]] = {}
    """Which axis of the tensors of `state` lies along positions, of families that `then` can join."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            FAMILIES.setdefault(cls.__name__, {})[cls.__module__, cls.__qualname__] = cls

    def __init__(self, shape: Sequence[int], mask: Mask, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, mask, dtype, device)
        self._values: Tensor | None = None

    @property
    def values(self) -> Tensor | None:
        """[batch, kv head, key, width], for value-weighted statistics; None if they were not kept."""
        return self._values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        if values is not None:
            b, h, n_keys = self.n_batch, self.n_heads, self.n_keys
            fits = values.dim() == 4 and values.shape[0] == b and values.shape[2] == n_keys and values.shape[3] > 0
            if not fits or values.shape[1] == 0 or h % values.shape[1]:
                raise CaptureError(
                    f"values must be [batch {b}, kv head, key {n_keys}, width], their heads a divisor of {h}",
                    shape=values.shape,
                )
            if values.device != self.device:
                raise CaptureError(f"the values are on {values.device}, and the pattern on {self.device}")
        self._values = values

    @property
    def by_magnitude(self) -> bool:
        """Whether statistics are those of |A| normalised per row."""
        return self.signed or not self.normalised

    @property
    def factors(self) -> Mapping[str, Pattern]:
        """The maps that it is made of, by name; a capture keeps them beside it. None for most."""
        return {}

    @abstractmethod
    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON facts and named tensors from which `rebuild` makes the pattern again; "values" where they are kept."""

    @classmethod
    @abstractmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Pattern:
        """The pattern from its `state`."""

    def kept(self, keep: Callable[[str, Tensor], Tensor]) -> Pattern:
        """The same pattern on tensors that `keep(name, tensor)` made of its own."""
        facts, tensors = self.state()
        made = self.rebuild(facts, {name: keep(name, tensor) for name, tensor in tensors.items()})
        made.before = self.before
        return made

    def then(self, later: Sequence[Pattern]) -> Pattern:
        """The map over these positions and those of later patterns, of a recurrence that went on from here to there.

        Raises:
            CaptureError: patterns of this family cannot be joined so, or what all positions share differs.
        """
        if not self.position_axes:
            raise CaptureError(f"steps of a {type(self).__name__} cannot be joined")
        facts, tensors = self._joined_facts(later), self.state()[1]
        several = [tensors, *(each.state()[1] for each in later)]
        whole: dict[str, Tensor] = {}
        for name in tensors:
            parts = [one[name] for one in several if name in one]
            if len(parts) < len(several):
                continue
            if name in self.position_axes:
                whole[name] = torch.cat(parts, dim=self.position_axes[name])
            elif all(torch.equal(part, parts[0]) for part in parts):
                whole[name] = parts[0].clone()
            else:
                raise CaptureError(f"the {name} of a {type(self).__name__} differs between steps")
        return self.rebuild(facts, whole)

    def _joined_facts(self, later: Sequence[Pattern]) -> dict[str, Any]:
        facts = self.state()[0]
        if any(type(each) is not type(self) or each.state()[0] != facts for each in later):
            raise CaptureError("kind, batch or heads of a recurrence differ between steps")
        return facts

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held."""
        return sum(t.untyped_storage().nbytes() for t in self.state()[1].values())

    def fused_magnitudes(self) -> FusedMagnitudes | None:
        """What collects statistics of |A|, normalised per row, in few launches; None for plain torch."""
        return None

    def engines(self, names: Sequence[str], options: Options) -> set[str]:
        """Names of the engines that stream these statistics in one pass: "torch", "native" (C++), "triton" …"""
        return self.magnitude().engines(names, options) if self.by_magnitude else {"torch"}

    @property
    def why_unfused(self) -> str:
        """Why no fused kernel makes statistics of it, where none does."""
        return f"no fused kernel knows a {type(self).__name__}"

    def unfused(self, names: Sequence[str], options: Options) -> str | None:
        """Why plain torch streams some of these statistics; None where it does not."""
        return self.magnitude().unfused(names, options) if self.by_magnitude else self.why_unfused

    def check(self) -> None:
        """Raise a CaptureError that names the first NaN or inf among the pattern's tensors."""
        self.mask.check_numbers()
        for name, tensor in self.state()[1].items():
            if name in ("q", "k", "weights"):
                check_finite(name, tensor)

    @property
    def lse(self) -> Tensor:
        """[batch, head, query] log of the softmax denominator; only softmax patterns have one."""
        raise CaptureError(f"{type(self).__name__} has no scores, hence no lse")

    def as_recurrence(self) -> Pattern | None:
        """The same map as a `RecurrentPattern`, whose decay, content and states can be told apart.

        None of maps that are none, or are one of another kind.
        """
        return None

    def magnitude(self, key_weights: Tensor | None = None) -> Pattern:
        """|A|, times [batch, head, key] weights if given, normalised per row."""
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

    @property
    def row_sum(self) -> Tensor:
        """[batch, head, query] Σ A; zero in rows without weight."""
        if self.by_magnitude:
            return self.magnitude().row_sum
        if self.normalised:
            return self.space().alive(self.space().per_query(1.0), 0.0)
        total = self.space().per_query()
        for tile in streaming.tiles(self):
            total[tile.rows] += tile.p.sum(-1)
        return total

    def ungated(self, values: Tensor) -> Tensor:
        """What the gates multiply, [batch, head, query, width], for values as in `apply`.

        Raises:
            CaptureError: it has no gates.
        """
        raise CaptureError(f"a {type(self).__name__} has no gates")

    def outputs(self, values: Tensor) -> Tensor:
        """A·V and what the rows read of a state from before, if there was one: what the heads give."""
        found = self.apply(values)
        return found if self.before is None else found + self.before.to(found)

    @property
    def before_share(self) -> Tensor:
        """[batch, head, query], from 0 to 1: what a row reads of a state from before, of all that it reads, by norms.

        ‖before‖ / (‖before‖ + Σ_j |A[i, j]|·‖v_j‖): the column "before" of a map whose rows are weighted by values.

        Raises:
            CaptureError: there was such a state, and the values were not kept.
        """
        if self.before is None:
            return torch.zeros(self.shape[:3], dtype=self.dtype, device=self.device)
        own = torch.zeros(self.shape[:3], dtype=self.dtype, device=self.device)
        norms = self.value_norms()
        for tile in streaming.tiles(self):
            own[tile.rows] += (tile.p.abs() @ norms[tile.batch, tile.heads, tile.keys, None]).squeeze(-1)
        size = self.before.to(self.dtype).norm(dim=-1)
        return size / (size + own).clamp(min=torch.finfo(self.dtype).tiny)

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

        >>> from workbench.kernels.patterns import DensePattern
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
        self._lse: Tensor | None = None  # ln Σ |A| of each row, from fused passes
        self._by_torch = False  # whether a pass was not fused

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """None of its own."""
        raise CaptureError("a pattern of magnitudes is made from another", hint="keep that one, and call magnitude()")

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> MagnitudePattern:
        """Not possible: see `state`."""
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

    @cached_property
    def _fused(self) -> FusedMagnitudes | None:
        return self.base.fused_magnitudes() if self.key_weights is None else None

    def collect(self, each: Pass, options: Options) -> dict[str, Tensor]:
        """The raw sums of one pass, fused where the base can."""
        fused = self._fused
        if fused is None or self.unfused(each.statistics, options) is not None:
            self._by_torch = True
            return super().collect(each, options)
        known = self._lse
        if known is None and self.denominators_known:
            known = self._sums.total.log().clamp(min=-1e20)
        raw = fused.collect(each, options, known)
        if each.finds_denominators:
            self._lse = self._asked(raw.pop("lse"))
        return raw

    def _asked(self, sums: Tensor) -> Tensor:
        """On a device: a row sum that is NaN, as it is where a query, a key or a decay is, is told at the end."""
        if self.device.type != "cpu":
            ask_later("Σ |A| of a row, hence its query, a key or a decay,", sums.sum)
        return sums

    def engines(self, names: Sequence[str], options: Options) -> set[str]:
        """Who streams these statistics."""
        return {"triton" if self.unfused(names, options) is None else "torch"}

    def unfused(self, names: Sequence[str], options: Options) -> str | None:
        """Why plain torch streams these; None where it does not."""
        if self.key_weights is not None:
            return "no fused kernel weighs magnitudes by values"
        return self.base.why_unfused if self._fused is None else self._fused.refusal(names, options)

    def raw_maker(self, batch: slice, heads: slice) -> RawTileMaker:
        """Tiles A·w."""
        which = range(self.n_heads)[heads]
        return lambda queries, keys: self._weighted(batch, queries, keys, which)

    @property
    def denominators_known(self) -> bool:
        """Whether the row sums were found already."""
        return self._lse is not None or "_sums" in self.__dict__

    def found_denominators(self, found: Denominators) -> None:
        """Keep the row sums."""
        self.__dict__["_sums"] = Denominators(*(each.to(self.dtype) for each in found))
        self._asked(self._sums.total)

    @cached_property
    def _sums(self) -> Denominators:
        """Σ |A|·w and Σ A·w per row."""
        if self._lse is not None and self._fused is not None:
            return Denominators(self._lse.exp().to(self.dtype), self._fused.row_sums().to(self.dtype))
        found = Denominators(*(each.to(self.dtype) for each in streaming.find_denominators(self)))
        self._asked(found.total)
        return found

    @property
    def signed_mass(self) -> Tensor:
        """[batch, head, query] Σ A·w / Σ |A|·w; NaN in rows without weight."""
        size, signed = self._sums
        return torch.where(size > 0, signed / size, torch.nan)

    @property
    def row_sum(self) -> Tensor:
        """[batch, head, query] Σ A·w."""
        return self._sums.signed

    @property
    def seen(self) -> MaskSummary:
        """The base's counts; once the row sums are known, a row without weight counts as one that sees no key."""
        seen = self.base.seen
        if not self.denominators_known:
            return seen
        keys = torch.where(self._sums[0] > 0, seen.keys_per_query, 0)
        return MaskSummary(keys, seen.queries_per_key, seen.first_key)

    def space(self) -> Space:
        """As others do; what fused passes give of rows without weight is NaN already."""
        if self._lse is None or self._by_torch:
            return super().space()
        return Space(*self.shape, self.mask, self.base.seen, self.device, self.dtype, all_see=True)

    def check(self) -> None:
        """As the base does."""
        self.base.check()
