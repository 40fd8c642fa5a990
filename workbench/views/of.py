"""`of`: the view of a result, and `all_of`: it and those below it. The file of each view registers its results."""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any

from workbench.errors import ReportError
from workbench.storage import disk
from workbench.views import page
from workbench.views.base import View


@singledispatch
def of(thing: Any) -> View:
    """The view that shows a capture or an analysis's result.

    Raises:
        ReportError: nothing shows such a thing.
    """
    raise ReportError(f"no view shows a {type(thing).__name__}", hint="pass a capture or the result of an analysis")


@singledispatch
def more_of(thing: Any) -> list[View]:
    """Views that stand below the one that `of` gives; none for most results."""
    return []


def all_of(thing: Any) -> list[View]:
    """All views of a capture or an analysis's result, the main one first; they share the selection.

    Raises:
        ReportError: nothing shows such a thing.
    """
    return [of(thing), *more_of(thing)]


def page_of(thing: Any, path: str | Path | None = None) -> str | Path:
    """All views of a thing on one self-contained page: its text, or its path when one is given.

    Raises:
        ReportError: nothing shows such a thing. FileError: the file cannot be written.
    """
    html = page.together([view.spec for view in all_of(thing)])
    return html if path is None else disk.write(path, html)
