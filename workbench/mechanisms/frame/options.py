"""Options of a mechanism against the annotations of what makes it, so that a wrong kind of value is named at once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from workbench.errors import WorkbenchError, nearest


def check_options(name: str, make: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise a WorkbenchError unless `make(place, **options)` takes options of these names and kinds.

    Numbers are checked to be whole or finite, tuples by what is in them; whether a number is in range, or a word one of
    those that there are, is for `make` itself.
    """
    known, others = _taken(make)
    for option, value in options.items():
        if option not in known:
            if others:
                continue
            raise WorkbenchError(f'"{name}" has no option "{option}"', hint=nearest(option, list(known), "option"))
        if not fits(value, known[option]):
            raise WorkbenchError(f'{option}={value!r} of "{name}" is not {said(known[option])}')


@cache
def _taken(make: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Annotations of what is taken by name behind the place, and whether any other name is taken too."""
    inner: Any = unwrapped(make)
    try:
        parameters = list(inspect.signature(make).parameters.values())[1:]
        hints = get_type_hints(inner.__init__ if inspect.isclass(inner) else inner)
    except (NameError, TypeError, ValueError):  # one that cannot be asked, or whose annotations are of other files
        return {}, True
    named = {p.name: hints.get(p.name, Any) for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def unwrapped(make: Callable[..., Any]) -> Callable[..., Any]:
    """What a partial, or a partial of one, calls."""
    while isinstance(make, partial):
        make = make.func
    return make


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind that an annotation says, as far as `check_options` looks.

    >>> fits(3, float), fits(math.nan, float), fits(True, int), fits(None, int | None), fits([1], tuple[bool, ...])
    (True, False, False, True, False)
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return type(value) in map(type, inner)
    if origin is tuple:
        return _is_list(value) and all(fits(one, inner[0]) for one in value)
    if origin is Sequence:
        return _is_list(value)
    if hint is NoneType:
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str) else True


def said(hint: Any) -> str:
    """The kind in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(said(one) for one in inner)
    if origin is Literal:
        return " or ".join(f'"{one}"' for one in inner)
    if origin is tuple:
        return f"a list of which each is {said(inner[0])}"
    if origin is Sequence:
        return "a list"
    words = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text", NoneType: "None"}
    return words.get(hint, str(hint))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
