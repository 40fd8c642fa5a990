"""Which views show what: `register` them, `of` and `all_of` make them, `page_of` puts them on a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

from workbench.errors import ReportError
from workbench.storage import disk
from workbench.views.base import page
from workbench.views.base.view import View


def register(
    shown: type, main: Callable[[Any], View], more: Callable[[Any], Sequence[View]] = lambda thing: ()
) -> None:
    """Say which views show things of a class: `result.show()`, pages and reports then have them.

    Subclasses are shown in the same way, unless they are registered themselves; the last registration counts.

    Args:
        main: makes the first view, whose picture stands for the thing.
        more: makes those that stand below it.
    """
    _main.register(shown, main)
    _more.register(shown, more)


def of(thing: Any) -> View:
    """The main view of a capture, an analysis's result, or anything else that is registered.

    Raises:
        ReportError: nothing shows such a thing.
    """
    return _main(thing)


def all_of(thing: Any) -> list[View]:
    """All views of a thing, the main one first; they share the selection.

    Raises:
        ReportError: nothing shows such a thing.
    """
    return [_main(thing), *_more(thing)]


def page_of(thing: Any, path: str | Path | None = None) -> str | Path:
    """All views of a thing on one self-contained page: its text, or its path when one is given.

    Raises:
        ReportError: nothing shows such a thing. FileError: the file cannot be written.
    """
    html = page.together([view.current for view in all_of(thing)])
    return html if path is None else disk.write(path, html)


@singledispatch
def _main(thing: Any) -> View:
    raise ReportError(
        f"no view shows a {type(thing).__name__}",
        hint="pass a capture or the result of an analysis, or register a view of it: workbench.views.register",
    )


@singledispatch
def _more(thing: Any) -> Sequence[View]:
    return ()
