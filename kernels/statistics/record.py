"""One record per statistic: what it means, its float64 definition, how it is collected, finished and merged.

A statistic is one file of this folder that makes its record with `register`. What only has a definition is computed
from whole rows, a few at a time; with an `Accumulator` it is collected from tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from workbench.errors import CaptureError, nearest
from workbench.kernels.statistics.accumulator import Accumulator
from workbench.kernels.statistics.by_definition import ByDefinition, defined
from workbench.kernels.statistics.existing import Rows
from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.shards import Shards
from workbench.kernels.statistics.whole_rows import WholeRows
from workbench.kernels.tile import Space

Axes = Literal["query", "key", "query top", "block"]
Found = Tensor | dict[str, Tensor]
Raw = Mapping[str, Tensor]
VALUE_WEIGHTED = "value_weighted_"


@dataclass(frozen=True)
class Statistic:
    r"""One named reduction of a pattern. p is a row A[b, h, i, :] over the keys j that query i may see.

    Attributes:
        axes: what follows [batch, head]: "query", "key", "query top" or "block" (query blocks x key blocks).
        unit: unit of the value, for axes and legends.
        meaning: one line of what it is.
        define: the definition, from `WholeRows` in float64; by output name where there are several.
        formula: the definition in LaTeX.
        range: smallest and largest value, whatever the length (of weights, where it has keys beside them).
        positional: whether it compares query and key positions, so that it exists for self-attention only.
        of_gates: whether it tells something of a gate, whose rows have one key, so that nothing in them is compared.
        outputs: names of the tensors that it gives; its own name if empty.
        empty: what a row that sees no key has.
        exists: which rows of a map can have one, bool that broadcasts to [batch, head, query]; the others are NaN, so
            that means over rows leave them out. None: every row that sees a key.
        value_weighted: whether it exists as `value_weighted_<name>` too: of p·‖v‖ renormalised per row.
        collect: makes what collects its raw sums from tiles; None to apply the definition to whole rows.
        needs_denominators: whether `collect` needs normalised weights, and so a second pass where the kernel gave no
            log-sum-exp; so it is for column statistics and for definitions.
        finish: makes the value of the raw sums, in `space.dtype`; None if one of them is the value. Row statistics
            get `empty` afterwards.
        merge: makes the value over all keys of those over shards of them; None if that cannot be.
        merges_with: statistics that `merge` needs of each shard besides `lse`.
        of_pattern: reads it from the pattern itself, without a pass.
    """

    name: str
    axes: Axes
    unit: str
    meaning: str
    define: Callable[[WholeRows], Found]
    formula: str = ""
    range: tuple[float, float] = (-math.inf, math.inf)
    positional: bool = False
    of_gates: bool = False
    outputs: tuple[str, ...] = ()
    empty: float = math.nan
    exists: Callable[[Rows, Options], Tensor] | None = None
    value_weighted: bool = True
    collect: Callable[[Space, Options], Accumulator] | None = None
    needs_denominators: bool = False
    finish: Callable[[Raw, Space, Options], Found] | None = None
    merge: Callable[[Shards], Found] | None = None
    merges_with: tuple[str, ...] = ()
    of_pattern: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name.startswith(("_", VALUE_WEIGHTED)):
            raise CaptureError(f'"{self.name}" cannot be the name of a statistic', hint="take a Python identifier")
        if self.axes not in ("query", "key", "query top", "block"):
            raise CaptureError(f'axes of "{self.name}" are query, key, query top or block, not {self.axes!r}')
        if self.of_columns and self.collect is None:
            raise CaptureError(
                f'"{self.name}" has no collect=, and its definition reads the whole map at once',
                hint="give it an Accumulator that adds up what each tile gives",
            )
        object.__setattr__(self, "outputs", self.outputs or (self.name,))
        needs = self.needs_denominators or self.of_columns or (self.collect is None and self.of_pattern is None)
        object.__setattr__(self, "needs_denominators", needs)

    @property
    def of_columns(self) -> bool:
        """Whether it adds up over queries, and not within each row."""
        return self.axes in ("key", "block")

    def defined(self, rows: WholeRows) -> dict[str, Tensor]:
        """Its definition, by output name; `empty` in rows that see no key."""
        found = defined(self.name, self.outputs, self.define, rows)
        if self.axes == "query":
            return {name: value.masked_fill(~rows.alive, self._empty_of(value)) for name, value in found.items()}
        return found

    def collector(self, space: Space, options: Options) -> Accumulator:
        """What collects it from tiles."""
        if self.collect is None:
            return ByDefinition(space, options, self.name, self.outputs, self.define)
        return self.collect(space, options)

    def finished(self, raw: Raw, space: Space, options: Options) -> dict[str, Tensor]:
        """Its outputs in the pattern's dtype, from the raw sums that an engine collected."""
        if self.finish is not None:
            made = self.finish(raw, space, options)
            outputs = made if isinstance(made, dict) else {self.name: made}
        else:
            outputs = {name: raw[name] for name in self.outputs}
        if self.axes == "query":
            found = {name: space.alive(value, self._empty_of(value)) for name, value in outputs.items()}
        else:
            found = {name: space.typed(value) for name, value in outputs.items()}
        return self.existing(found, Rows(space.mask, space.shape, space.device, space.seen.derived), options)

    def existing(self, found: dict[str, Tensor], rows: Rows, options: Options) -> dict[str, Tensor]:
        """Its outputs, NaN in rows that cannot have it."""
        if self.exists is None:
            return found
        there = self.exists(rows, options)
        return {name: value.masked_fill(~there, math.nan) for name, value in found.items()}

    def _empty_of(self, value: Tensor) -> float:
        if math.isnan(self.empty) and not value.is_floating_point():
            raise CaptureError(f'"{self.name}" gives {value.dtype}, which has no NaN', hint="register it with empty=-1")
        return self.empty

    def merged(self, shards: Shards) -> dict[str, Tensor]:
        """Its outputs over all keys, in float64."""
        assert self.merge is not None
        found = self.merge(shards)
        return found if isinstance(found, dict) else {self.name: found}


STATISTICS: dict[str, Statistic] = {}
"""Every statistic by name. Each whose record says so also exists as `value_weighted_<name>`."""


def register(statistic: Statistic) -> Statistic:
    """Make a statistic known by its name.

    Raises:
        CaptureError: the name, or one of its outputs, is taken.
    """
    taken = {out: known.name for known in STATISTICS.values() for out in (known.name, *known.outputs)}
    for name in (statistic.name, *statistic.outputs):
        if name in taken:
            raise CaptureError(f'there is a statistic "{taken[name]}" already', hint="take another name")
    STATISTICS[statistic.name] = statistic
    return statistic


def unregister(name: str) -> None:
    """Forget a statistic.

    Raises:
        CaptureError: there is none of that name.
    """
    if STATISTICS.pop(name, None) is None:
        raise CaptureError(f'there is no statistic "{name}"', hint=nearest(name, list(STATISTICS)))


def known(name: str) -> Statistic:
    """The record of a statistic, also of `value_weighted_<name>`.

    Raises:
        CaptureError: there is none; the hint names the nearest.
    """
    base = name.removeprefix(VALUE_WEIGHTED)
    found = STATISTICS.get(base)
    if found is None or (base != name and not found.value_weighted):
        raise CaptureError(f'there is no statistic "{name}"', hint=nearest(base, list(STATISTICS)))
    return found


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple without repeats; an unknown one is an error that suggests the nearest.

    >>> check_names(["entropy", "value_weighted_peak"])
    ('entropy', 'value_weighted_peak')
    """
    if isinstance(names, str):
        raise CaptureError("statistics are a list of names, not one string", hint=f'write statistics=["{names}"]')
    unique = tuple(dict.fromkeys(names))
    for name in unique:
        known(name)
    return unique


def output_names(name: str) -> tuple[str, ...]:
    """Names of the tensors that a statistic produces: `top_keys` gives an index and a weight.

    >>> output_names("value_weighted_top_keys")
    ('value_weighted_top_keys_index', 'value_weighted_top_keys_weight')
    """
    prefix = VALUE_WEIGHTED if name.startswith(VALUE_WEIGHTED) else ""
    return tuple(prefix + out for out in known(name).outputs)
