"""How what is stored shows itself, without knowing who draws it: the package above puts its views in here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from workbench.errors import ReportError, WorkbenchError


class Drawn(Protocol):
    """Something that can be looked at."""

    def show(self) -> None:
        """Display it in a notebook."""

    def to_png(self, path: str | Path | None = None) -> bytes | Path:
        """A picture: its bytes, or its path when one is given."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]: ...


class Renderer(Protocol):
    """What draws captures and results: `workbench.views` is one."""

    def of(self, thing: Any, /) -> Drawn:
        """The main view of a thing."""

    def all_of(self, thing: Any, /) -> Sequence[Drawn]:
        """All views of a thing, the main one first."""

    def page_of(self, thing: Any, path: str | Path | None = None, /) -> str | Path:
        """All views of a thing on one page: its text, or its path when one is given."""


_source: Callable[[], Renderer] | None = None


def provide(source: Callable[[], Renderer]) -> None:
    """Say what draws. `source` is called when something is first shown, so that saving and loading import no views."""
    global _source
    _source = source


def need_notebook(hint: str) -> None:
    """Raise a ReportError unless this runs in a notebook or in IPython, where something can be displayed."""
    from IPython import get_ipython

    if get_ipython() is None:
        raise ReportError("there is no notebook to show this in", hint=hint)


def renderer() -> Renderer:
    """What draws.

    Raises:
        WorkbenchError: nothing was provided.
    """
    if _source is None:
        raise WorkbenchError("nothing here draws views", hint="import workbench, which provides them")
    return _source()
