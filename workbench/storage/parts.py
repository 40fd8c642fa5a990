"""The door for what files say: JSON of bounded depth, and readings that say what each value has to be.

Whatever is wrong with a value is a `FormatError` that names the file and the place in it; nothing is allocated by what
a file says before that is known to be in range.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from workbench.errors import FormatError

DEEPEST = 64
"""How far lists and objects of a file may be nested."""
# A string, with its quoted quotes, or a bracket; a string that does not end takes all that is left, so that time is
# linear whatever the text is.
_TOKENS = re.compile(r'"(?:[^"\\]+|\\.)*+(?:"|\\?\Z)|[][{}]', re.DOTALL)


def parse(text: str | bytes, name: str) -> Part:
    """The JSON value of a text from a file.

    Args:
        name: of the file, for errors.

    Raises:
        FormatError: it is no UTF-8 or no JSON, nested too deeply, or says something twice.
    """
    try:
        return Part(loads(text), name)
    except ValueError as error:
        raise FormatError(f"{name} is damaged: {error}") from None


def loads(text: str | bytes) -> Any:
    """JSON of bounded depth without repeated keys.

    Raises:
        ValueError: it is none.

    >>> loads('{"a": [1, 2]}')
    {'a': [1, 2]}
    """
    whole = text if isinstance(text, str) else text.decode("utf-8")
    if too_deep(whole):
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    return json.loads(whole, object_pairs_hook=_once)


def too_deep(text: str) -> bool:
    """Whether JSON is nested more than `DEEPEST` deep; in linear time, also of what is no JSON."""
    depth = 0
    for found in _TOKENS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > DEEPEST:
            return True
    return False


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


@dataclass(frozen=True)
class Part:
    """A JSON value of a file, with its place.

    >>> Part({"n": [3]}, "file")["n"].list()[0].integer(0, 5)
    3
    """

    value: Any
    place: str

    def __getitem__(self, key: str) -> Part:
        """The value under a key, which has to be there."""
        found = self.items().get(key)
        if found is None:
            raise FormatError(f"{self.place} has no {key!r}")
        return found

    def get(self, key: str) -> Part | None:
        """The value under a key; None if there is none, or null."""
        found = self.items().get(key)
        return None if found is None or found.value is None else found

    def items(self) -> dict[str, Part]:
        """The values of an object by their keys."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return {key: Part(value, f"{self.place}, {_short(key)}") for key, value in self.value.items()}

    def list(self, most: int | None = None, least: int = 0) -> list[Part]:
        """The values of a list."""
        if not isinstance(self.value, list) or (most is not None and not least <= len(self.value) <= most):
            raise self.wrong("a list" if most is None else f"a list of {least} to {most} values")
        return [Part(value, f"{self.place}, {i}") for i, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.wrong("text")
        return self.value

    def one_of(self, known: Container[str]) -> str:
        if self.text() not in known:
            raise self.wrong("one that this package knows")
        return self.text()

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def integer(self, low: int = -(2**63), high: int = 2**63 - 1) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not low <= self.value <= high:
            raise self.wrong(f"a whole number from {low:,} to {high:,}")
        return self.value

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise self.wrong("a number")
        try:
            return float(self.value)
        except OverflowError:
            raise self.wrong("a number that fits") from None

    def plain(self) -> Any:
        """The value as it is; its depth is bounded, nothing else is."""
        return self.value

    def wrong(self, wanted: str) -> FormatError:
        """The error that says what the value should be."""
        return FormatError(f"{self.place} is {_short(self.value)}, not {wanted}")


def each_text(part: Part) -> list[str]:
    """A list of texts, checked at once: token lists are long."""
    if not isinstance(part.value, list) or not all(isinstance(text, str) for text in part.value):
        raise part.wrong("a list of texts")
    return part.value


def _short(value: Any) -> str:
    said = ascii(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return said if len(said) <= 60 else said[:57] + "…"
