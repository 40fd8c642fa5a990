"""Whether values from a file are what a dataclass declares: types, dtypes, and shapes that fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

from workbench.errors import FormatError
from workbench.storage.parts import Part

_T = TypeVar("_T")
_MOST = 2**53  # whole numbers beyond it are not those of any result


def check(owner: type, held: Mapping[str, Any], place: str) -> None:
    """Raise a FormatError that names the first field whose value is not of its declared type.

    Axes of the same name must have the same length in all fields: those of tensors in their annotations, such as
    `Float[Tensor, "row bin"]`, those of tuples in the class's `tuple_axes`.
    """
    hints, along = _hints(owner), getattr(owner, "tuple_axes", {})
    axes: dict[str, int] = {}
    for name, value in held.items():
        if not _fits(value, hints[name], axes) or (name in along and not _bound(along[name], (len(value),), axes)):
            shape = tuple(value.shape) if isinstance(value, (torch.Tensor, np.ndarray)) else None
            raise FormatError(f"{place} holds {name} that is no {_say(hints[name])} like the rest of it", shape=shape)


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
    return get_type_hints(owner)


def _say(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _fits(value: Any, hint: Any, axes: dict[str, int]) -> bool:
    """Whether a value is of a type; the lengths of its named axes are added to those that are known."""
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
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


def _bound(names: str, sizes: tuple[int, ...], axes: dict[str, int]) -> bool:
    """Whether axes have the lengths that are known of them; those that are not are known from now on."""
    for name, size in zip(names.split(), sizes, strict=False):
        if name == "...":
            break
        if axes.setdefault(name, int(name) if name.isdecimal() else size) != size:
            return False
    return True
