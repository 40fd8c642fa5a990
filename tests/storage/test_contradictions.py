"""Results whose parts contradict each other are refused when they are read, whatever their class is.

Each class is made from its own annotations: every axis a length of its own, so that a part that is cut short, or that
lies along another axis, cannot fit by chance.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints, is_typeddict

import pandas as pd
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import workbench.analysis
import workbench.mechanisms
import workbench.sweep
from workbench.analysis.atlas.encoder import Autoencoder
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.nodes import Layer
from workbench.errors import FormatError
from workbench.storage.result import Result
from workbench.storage.typed import Among, Between, Keys, Places


def every_result() -> list[type[Result]]:
    for package in (workbench.analysis, workbench.mechanisms, workbench.sweep):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found = list(Result.__subclasses__())
    for one in found:  # which grows: some have a base of their own
        found += one.__subclasses__()
    found = [one for one in found if not inspect.isabstract(one)]
    return sorted({one for one in found if one.__module__.startswith("workbench.")}, key=lambda one: one.__name__)


RESULTS = every_result()
GRAPH = Graph((Layer(2, 1), Layer(2, 1)), 8)
SIZES = {
    "AttentionRollout": {"site": 3, "place": 4},
    "Circuit": {"sender": len(GRAPH.senders), "receiver": len(GRAPH.receivers)},
    "Pruning": {"sender": len(GRAPH.senders), "receiver": len(GRAPH.receivers)},
    "MemoryReading": {"query": 12, "cell": 12},
    "PatternAtlas": {"query": 16, "key": 16, "width": 5},
}
GIVEN: dict[str, dict[str, Any]] = {
    "Circuit": {"model": GRAPH.facts, "level": "edge"},
    "GateProfile": {"gates": ("a", "b"), "grids": {"a": (1, 2), "b": (2, 1)}},
    "MemoryReading": {"grid": torch.tensor([3, 4])},
    "MemoryTree": {"frames": (0, 1, 2), "parents": (-1, 0, 1), "kept": (0, 0, 0)},
    "Pruning": {"model": GRAPH.facts},
    "PatternAtlas": {"weights": Autoencoder(16, 5).state_dict()},
}
"""What no annotation tells: the graph behind scores, the weights of a network, the grid of positions, a tree."""


def notes_of(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


class Maker:
    """An object of a class, from what its annotations say."""

    def __init__(self, owner: type, sizes: dict[str, int]) -> None:
        self.hints, self.sizes = get_type_hints(owner, include_extras=True), dict(sizes)
        self.held: dict[str, Any] = {}

    def size(self, axis: str) -> int:
        axis = axis.removeprefix("?")
        return 2 if axis == "_" else self.sizes.setdefault(axis, 3 + len(self.sizes))

    def value(self, hint: Any, name: str, along: str = "") -> Any:
        base, notes = notes_of(hint)
        origin, inner = get_origin(base), get_args(base)
        told = [note for note in notes if isinstance(note, str)]
        along = told[0] if told else along
        first, _, rest = along.partition(" ")
        if origin in (Union, UnionType):
            return self.value(next(one for one in inner if one is not NoneType), name)
        if origin is tuple and inner[-1:] == (...,):
            n = self.size(first) if first else 2
            if any(isinstance(note, Places) for note in notes):
                return tuple(range(n))
            return tuple(self.value(inner[0], f"{name}{i}", rest) for i in range(n))
        if origin is tuple:
            return tuple(self.value(one, f"{name}{i}") for i, one in enumerate(inner))
        for note in notes:
            if is_typeddict(note):
                entries = get_type_hints(note, include_extras=True)
                return {key: self.value(one, key, along) for key, one in entries.items()}
        if origin is dict:
            if inner[1] is Any:
                return {}
            return {key: self.value(inner[1], f"{name} {key}", along) for key in self.keys(notes, inner[0])}
        if base is int:
            lowest = [int(note.low) for note in notes if isinstance(note, Between)]
            return self.size(first) if first else max([1, *lowest])
        if base in (str, float, bool):
            return {str: name, float: 0.5, bool: True}[base]
        if hasattr(base, "dim_str"):
            return self.tensor(base)
        return {}

    def keys(self, notes: tuple[Any, ...], hint: Any) -> list[Any]:
        for note in notes:
            if isinstance(note, Keys):
                told = [list(self.of(name)) for name in note.of.split()]
                return told[0] if len(told) == 1 else list(product(*told))
        return ["a", "b"] if hint is str else [("a", "b")]

    def of(self, name: str) -> Any:
        if name not in self.held:
            self.held[name] = self.value(self.hints[name], name)
        return self.held[name]

    def tensor(self, hint: Any) -> Tensor:
        shape: list[int] = []
        for axis in hint.dim_str.split():
            shape += (
                [2, 2]
                if axis[0] == "*"
                else []
                if axis == "..."
                else [int(axis) if axis.isdecimal() else self.size(axis)]
            )
        kinds = {"Bool": torch.bool, "Int": torch.int64, "Integer": torch.int64, "UInt8": torch.uint8}
        dtype = kinds.get(hint.__name__.partition("[")[0], torch.float64)
        return torch.ones(shape, dtype=dtype) if dtype != torch.float64 else torch.rand(shape, dtype=dtype)


def made(owner: type[Result]) -> Result:
    maker = Maker(owner, SIZES.get(owner.__name__, {}))
    maker.held |= GIVEN.get(owner.__name__, {})
    return owner(**{field.name: maker.of(field.name) for field in fields(owner)})  # type: ignore[arg-type]


def axes_of(hint: Any) -> list[str]:
    """The names of axes that a field lies along, in order; literal lengths and axes of its own are left out."""
    base, notes = notes_of(hint)
    named = [axis.removeprefix("?") for note in notes if isinstance(note, str) for axis in note.split()]
    if get_origin(base) is dict and not named:
        return axes_of(get_args(base)[1])
    if get_origin(base) in (Union, UnionType):
        return [axis for one in get_args(base) for axis in axes_of(one)]
    return named or getattr(base, "dim_str", "").split()


def shortened(value: Any, at: int) -> Any:
    """The value, one shorter along one of its axes."""
    if isinstance(value, Tensor):
        return value.narrow(at, 0, value.shape[at] - 1).clone()
    if isinstance(value, dict):
        last = list(value)[-1]
        return value | {last: shortened(value[last], at)}
    if isinstance(value, int):
        return value - 1
    return value[:-1] if at == 0 else (*value[:-1], value[-1][:-1])


def contradictions(result: Result) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(type(result), include_extras=True)
    named = {field.name: axes_of(hints[field.name]) for field in fields(result)}  # type: ignore[arg-type]
    count = Counter(axis for several in named.values() for axis in set(several))
    for name, axes in named.items():
        for at, axis in enumerate(axes):
            plain = axis.isidentifier() and axis != "_"
            if plain and (count[axis] > 1 or axes.count(axis) > 1):
                yield f"{name} along {axis}", replace(result, **{name: shortened(getattr(result, name), at)})
        for note in notes_of(hints[name])[1]:
            if isinstance(note, Keys):
                held = getattr(result, name)
                yield f"a key of {name}", replace(result, **{name: {"none of them": next(iter(held.values()))} | held})
            if isinstance(note, Among):
                yield f"a number of {name}", replace(result, **{name: getattr(result, name) + 10**6})
            if isinstance(note, Places):
                held = getattr(result, name)
                odd = (*held[:-1], 10**6) if isinstance(held, tuple) else held + 10**6
                yield f"places of {name}", replace(result, **{name: odd})


@pytest.mark.parametrize("owner", RESULTS, ids=lambda one: one.__name__)
def test_parts_that_contradict_each_other_are_refused(owner: type[Result], tmp_path: Path) -> None:
    whole = made(owner)
    again = owner.load(whole.save(tmp_path / "whole"))
    assert repr(again)
    assert isinstance(again.table, pd.DataFrame)
    tried = 0
    for what, odd in contradictions(whole):
        path = odd.save(tmp_path / "odd")
        try:
            owner.load(path)
        except FormatError:
            tried += 1
            continue
        raise AssertionError(f"{owner.__name__} is read with another {what}")
    assert tried or owner.__name__ == "ComparisonProgress"


def coarse(value: Any) -> Any:
    """The same in bfloat16, which NumPy does not know."""
    if isinstance(value, dict):
        return {key: coarse(one) for key, one in value.items()}
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("owner", RESULTS, ids=lambda one: one.__name__)
def test_numbers_of_any_width_are_shown(owner: type[Result], tmp_path: Path) -> None:
    whole = made(owner)
    changed = {field.name: coarse(getattr(whole, field.name)) for field in fields(whole)}  # type: ignore[arg-type]
    again = owner.load(replace(whole, **changed).save(tmp_path / "coarse"))
    assert repr(again)
    assert isinstance(again.table, pd.DataFrame)


@pytest.mark.parametrize("owner", RESULTS, ids=lambda one: one.__name__)
def test_every_tensor_says_what_its_axes_are(owner: type[Result]) -> None:
    def bare(hint: Any) -> bool:
        base, _ = notes_of(hint)
        return base is Tensor or any(bare(one) for one in get_args(base) if one is not ...)

    assert [name for name, hint in get_type_hints(owner, include_extras=True).items() if bare(hint)] == []


@dataclass(frozen=True)
class Kinds(Result):
    """One field of each kind that an annotation can say something of."""

    form = "workbench.test_kinds"
    filled: ClassVar = ("draw",)

    labels: Annotated[tuple[str, ...], "row"]
    groups: Annotated[tuple[tuple[str, ...], ...], "row _"]
    texts: Annotated[tuple[str, ...], "?row"]
    n_rows: Annotated[int, "row"]
    cells: Float[Tensor, " row *cell"]
    errors: Float[Tensor, " row *cell"]
    by_label: Annotated[dict[str, float], Keys("labels")]
    by_some: Annotated[dict[str, float], Keys("labels", some=True)]
    chosen: Annotated[tuple[int, ...], Places("row")]
    counts: Annotated[tuple[int, ...], Places("row", end=True)]
    share: Annotated[float, Between(0, 1)]
    draws: Float[Tensor, " draw"]
    provenance: dict[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        return pd.DataFrame()


KINDS = Kinds(
    labels=("a", "b"), groups=(("x",), ()), texts=("t", "u"), n_rows=2, cells=torch.zeros(2, 3, 4),
    errors=torch.zeros(2, 3, 4), by_label={"a": 1.0, "b": 2.0}, by_some={"b": 0.0}, chosen=(1, 0, 1), counts=(0, 2),
    share=0.5, draws=torch.zeros(1), provenance={},
)  # fmt: skip


@pytest.mark.parametrize(
    "fit", [{}, {"texts": ()}, {"by_some": {}}, {"groups": ((), ())}, {"chosen": ()}, {"share": 1.0}, {"share": 0}]
)
def test_what_fits_is_read(fit: dict[str, Any], tmp_path: Path) -> None:
    assert Kinds.load(replace(KINDS, **fit).save(tmp_path / "file")).labels == ("a", "b")


@pytest.mark.parametrize(
    "odd",
    [
        {"labels": ("a",)}, {"groups": (("x",),)}, {"texts": ("t",)}, {"n_rows": 3}, {"cells": torch.zeros(2, 3)},
        {"errors": torch.zeros(2, 4, 3)}, {"by_label": {"a": 1.0}}, {"by_label": {"a": 1.0, "b": 2.0, "c": 3.0}},
        {"by_some": {"c": 1.0}}, {"chosen": (2,)}, {"chosen": (-1,)}, {"counts": (3,)}, {"share": 1.5},
        {"share": float("nan")}, {"draws": torch.zeros(0)},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_refused(odd: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"{next(iter(odd))}|errors|no draw"):
        Kinds.load(replace(KINDS, **odd).save(tmp_path / "file"))
