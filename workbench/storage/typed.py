"""Whether values from a file are what a dataclass declares: types, dtypes, and shapes that fit each other.

Everything is said in the annotations, so that a class of results has no check of its own:

- `Float[Tensor, "row bin"]`, dtype and named axes; what is named alike has the same length in all fields. A last
  `*rest` stands for several axes, `_` for one that nothing else lies along.
- `Annotated[tuple[str, ...], "row"]`, a tuple along an axis; "row _" one of tuples, "?row" one that may be empty
  instead. Of a dict it says what each value lies along, of a whole number that it is the length of the axis.
- `Annotated[dict[str, Tensor], Keys("experiments")]`, a dict whose keys another field tells.
- `Annotated[dict[str, Any], Row]`, a dict with the entries of the TypedDict `Row`, or more; its axes are its own.
- `Annotated[int, Between(1)]`, a number in a range; `Places("row")`, numbers that point along an axis;
  `Among("word_ids")`, numbers that another field lists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import torch

from workbench.errors import FormatError
from workbench.storage.parts import Part

_T = TypeVar("_T")
_MOST = 2**53  # whole numbers beyond it are not those of any result


@dataclass(frozen=True)
class Keys:
    """Which keys a dict has: the values of a tuple, or the keys of another dict; of several fields, one of each.

    Attributes:
        of: names of the fields, apart by spaces.
        some: whether keys may be missing.
    """

    of: str
    some: bool = False

    def fit(self, keys: Iterable[Any], held: Mapping[str, Any]) -> bool:
        """Whether a dict has them."""
        told = [tuple(held[name]) for name in self.of.split()]
        wanted = set(told[0] if len(told) == 1 else product(*told))
        return set(keys) <= wanted if self.some else set(keys) == wanted


@dataclass(frozen=True)
class Places:
    """Whole numbers that are places along an axis; `end`: or just behind its end."""

    axis: str
    end: bool = False

    def fit(self, value: Any, axes: Mapping[str, int]) -> bool:
        """Whether the numbers of a tuple or tensor are."""
        numbers = torch.as_tensor(value)
        return not numbers.numel() or (int(numbers.min()) >= 0 and int(numbers.max()) < axes[self.axis] + self.end)


@dataclass(frozen=True)
class Among:
    """Whole numbers each of which another field lists."""

    of: str

    def fit(self, value: Any, held: Mapping[str, Any]) -> bool:
        """Whether the numbers of a tuple or tensor are."""
        return set(torch.as_tensor(value).flatten().tolist()) <= set(held[self.of])


@dataclass(frozen=True)
class Between:
    """A number from `low` to `high`."""

    low: float
    high: float = math.inf


def check(owner: type, held: Mapping[str, Any], place: str) -> None:
    """Raise a FormatError that names the first field whose value is not what its annotation declares.

    Axes and fields that the class names in `filled` have to hold something.
    """
    hints = _hints(owner)
    axes: dict[str, int] = {}
    for name, value in held.items():
        if not _fits(value, hints[name], axes):
            shape = tuple(value.shape) if isinstance(value, (torch.Tensor, np.ndarray)) else None
            raise FormatError(f"{place} holds {name} that is no {_say(hints[name])} like the rest of it", shape=shape)
    for name, value in held.items():
        for note in getattr(hints[name], "__metadata__", ()):
            if isinstance(note, Keys) and not note.fit(value, held):
                raise FormatError(f"{place} holds {name} with other keys than {note.of}")
            if isinstance(note, Among) and not note.fit(value, held):
                raise FormatError(f"{place} holds {name} that {note.of} does not list")
            if isinstance(note, Places) and not note.fit(value, axes):
                raise FormatError(f"{place} holds {name} that are no places along {note.axis!r}")
    for name in getattr(owner, "filled", ()):
        if axes.get(name) == 0 or (name in held and not held[name]):
            raise FormatError(f"{place} holds no {name}")


def record(part: Part, owner: type[_T]) -> _T:
    """The dataclass whose fields an object of a file gives by name; those with defaults may be missing.

    Raises:
        FormatError: a field is missing, unknown, or not of its declared type.
    """
    values = {name: value.value for name, value in part.items().items()}
    known = {field.name for field in fields(owner)}  # type: ignore[arg-type]
    if not values.keys() <= known:
        raise FormatError(f"{part.place} has {sorted(values.keys() - known)[0]!r}, which this version does not know")
    check(owner, values, part.place)
    try:
        return owner(**values)
    except TypeError:
        raise part.wrong(
            f"a whole {owner.__name__}: it lacks some of {', '.join(sorted(known - set(values)))}"
        ) from None


@cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _say(hint: Any) -> str:
    hint = hint.__origin__ if get_origin(hint) is Annotated else hint
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _fits(value: Any, hint: Any, axes: dict[str, int]) -> bool:
    """Whether a value is of a type; the lengths of its named axes are added to those that are known."""
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, inner[0], axes) and all(_agrees(value, note, axes) for note in inner[1:])
    if origin is Literal:
        return value in inner and type(value) in map(type, inner)
    if origin in (Union, UnionType):
        return any(_fits(value, one, axes) for one in inner)
    if hint in (None, NoneType):
        return value is None
    if hint in (bool, str):
        return type(value) is hint
    if hint is int:
        return type(value) is int and abs(value) <= _MOST
    if hint is float:
        return type(value) is float or (type(value) is int and abs(value) <= _MOST)
    if origin is tuple and inner[-1:] != (...,):
        parts = type(value) is tuple and len(value) == len(inner)
        return parts and all(_fits(one, each, axes) for one, each in zip(value, inner, strict=True))
    if origin in (tuple, list, frozenset):
        return type(value) is origin and all(_fits(one, inner[0], axes) for one in value)
    if origin is dict:
        pairs = value.items() if type(value) is dict else None
        return pairs is not None and all(_fits(k, inner[0], axes) and _fits(v, inner[1], axes) for k, v in pairs)
    if isinstance(hint, type):
        named: str | None = getattr(hint, "dim_str", None)
        shape = () if named is None else tuple(getattr(value, "shape", ()))
        return isinstance(value, hint) and (named is None or _bound(named, shape, axes))
    raise TypeError(f"a field of a result is declared as {hint}, which no file can be checked against")


def _agrees(value: Any, note: Any, axes: dict[str, int]) -> bool:
    """Whether a value is as a note beside its type says; what its keys are is seen later, when all fields are known."""
    if isinstance(note, str):
        return _lies_along(value, note, axes)
    if isinstance(note, Between):
        return bool(note.low <= value <= note.high)
    if not is_typeddict(note):
        return True
    entries = _hints(note)
    own = dict(axes)
    return note.__required_keys__ <= value.keys() and all(
        _fits(one, entries[name], own) for name, one in value.items() if name in entries
    )


def _lies_along(value: Any, names: str, axes: dict[str, int]) -> bool:
    if isinstance(value, dict):
        return all(_lies_along(one, names, axes) for one in value.values())
    if isinstance(value, int):
        return _bound(names, (value,), axes)
    first, _, rest = names.partition(" ")
    if first.startswith("?") and not value:
        return True
    return _bound(first.removeprefix("?"), (len(value),), axes) and (
        not rest or all(_lies_along(one, rest, axes) for one in value)
    )


def _bound(names: str, sizes: tuple[int, ...], axes: dict[str, Any]) -> bool:
    """Whether axes have the lengths that are known of them; those that are not are known from now on."""
    for i, name in enumerate(names.split()):
        if name == "...":
            break
        if name.startswith("*"):
            return axes.setdefault(name, sizes[i:]) == sizes[i:]
        if name != "_" and axes.setdefault(name, int(name) if name.isdecimal() else sizes[i]) != sizes[i]:
            return False
    return True
