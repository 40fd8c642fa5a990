"""`View`: the base of all views. A spec, a picture of it, and the ways in which it is shown."""

from __future__ import annotations

import base64
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
from markupsafe import Markup

from workbench.errors import ReportError
from workbench.storage import disk
from workbench.storage.json_text import finite
from workbench.storage.rendering import need_notebook
from workbench.tokens import visible_text
from workbench.views.base import drawing, page
from workbench.views.base.selection import SHARED, Selection, SharedSelection
from workbench.views.base.spec import ViewSpec, origin_line
from workbench.views.base.stills import Stills

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from workbench.views.base.widget import ViewWidget

TABLE_ROWS = 50  # rows of the table that stands below a picture
DPI = 120
_COLOURS_OF_DARK = 128  # of the second picture that a notebook keeps, which makes it small


class View(ABC):
    """Something to look at: live in a notebook, as a page of its own, as a picture, as a table.

    A subclass makes a `ViewSpec` of a kind that is registered (`register_kind`) and draws its `picture`. One that can
    compute more on demand answers questions from the live module in `answer`.

    Attributes:
        spec: what is shown, as data.
        size: width and height of the picture in inches.
        colours: how many the picture keeps; None for all.
    """

    size: tuple[float, float] = (8.0, 4.5)
    colours: int | None = None

    def __init__(self, spec: ViewSpec, selection: SharedSelection | None = None) -> None:
        self.spec = spec
        self._shared = SHARED if selection is None else selection
        self._stills: Stills | None = None
        self._follows = False

    @abstractmethod
    def picture(self, figure: Figure) -> None:
        """Draw what matters of what is `chosen` and of the `state`, on an empty figure; colours and fonts are set."""

    def answer(self, question: Mapping[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        """Answer the live module: JSON values, and buffers of bytes. Errors of ours reach the module as text."""
        raise ReportError(f"this view cannot answer {question.get('ask')!r}")

    @property
    def selection(self) -> Selection:
        """What is selected in this view and in those that show the same model, or the same inputs."""
        self._follows = True
        return self._shared.of(self.spec.scope)

    @property
    def chosen(self) -> Selection:
        """What the view shows as chosen: the selection, or where nothing is selected what its spec begins with."""
        return self.selection.over(Selection.of(self.spec.selection))

    @property
    def current(self) -> ViewSpec:
        """The spec as it stands now: pages and reports of the view open with what is selected and set in it."""
        return self.spec.choosing(self._shared)

    def select(self, **changes: Any) -> Self:
        """Change the shared selection: `view.select(layer=5, heads=(1,))`; returns the view."""
        self._shared.select(self.spec.scope, **changes)
        return self

    def on_select(self, callback: Callable[[Selection], object]) -> Callable[[], None]:
        """Call back with every new selection, from Python or from a click; what is returned ends that."""
        return self._shared.on_select(callback, self.spec.scope)

    @property
    def state(self) -> dict[str, Any]:
        """What has been set in this view alone, JSON values; a page or report that is made of the view keeps it."""
        return dict(self.spec.state)

    def set_state(self, **changes: Any) -> Self:
        """Change some of the state, here and in the browser; returns the view.

        Raises:
            ReportError: the view has no such state.
        """
        self._put_state(finite({**self.spec.state, **changes}))
        return self

    def _put_state(self, state: Mapping[str, Any]) -> None:
        if state == self.spec.state:
            return
        self.spec = replace(self.spec, state=state)
        if "widget" in self.__dict__:
            self.widget.state = dict(state)
        if self._stills is not None:
            self._stills.outdate()

    def _renew(self, spec: ViewSpec) -> None:
        """Show another spec of the same kind and scope: here, in the browser, and in the pictures of the notebook."""
        self.spec = spec
        if "widget" in self.__dict__:
            self.widget.spec = spec.to_live()
        if self._stills is not None:
            self._stills.outdate()

    def _followed(self, _: Selection) -> None:
        """Pictures for which nobody has asked what is selected stay as they are."""
        if self._follows and self._stills is not None:
            self._stills.outdate()

    def data(self) -> pd.DataFrame:
        """The numbers that are shown, as a table."""
        return pd.DataFrame(dict(self.spec.table))

    @cached_property
    def widget(self) -> ViewWidget:
        """The live widget; one per view, however often it is shown."""
        from workbench.views.base.widget import ViewWidget

        return ViewWidget.of(self, self._shared)

    def show(self) -> None:
        """Display the view in a notebook.

        Raises:
            ReportError: there is no notebook.
        """
        from IPython.display import display

        need_notebook("write a page: view.to_html('view.html')")
        display(self)

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """The view as one self-contained page: its text, or its path when one is given.

        Raises:
            FileError: the file cannot be written.
        """
        html = page.single(self.current)
        return html if path is None else disk.write(path, html)

    def to_png(
        self,
        path: str | Path | None = None,
        *,
        theme: str = "light",
        dpi: int = DPI,
        words: bool = False,
        transparent: bool = False,
    ) -> bytes | Path:
        """The picture: its bytes, or its path when one is given.

        Args:
            theme: "light" or "dark".
            words: with the title above it, and the caption and a line of provenance below it.
            transparent: without a background.

        Raises:
            FileError: the file cannot be written.
        """
        if words or transparent:
            return self._drawn("png", path, theme=theme, dpi=dpi, words=words, transparent=transparent)
        found = drawing.png(self.picture, self.size, theme=theme, dpi=dpi, colours=self.colours)
        return found if path is None else disk.write(path, found)

    def to_svg(
        self, path: str | Path | None = None, *, theme: str = "light", words: bool = True, transparent: bool = False
    ) -> bytes | Path:
        """The picture for a paper or a talk, as SVG; arguments as those of `to_png`.

        Raises:
            FileError: the file cannot be written.
        """
        return self._drawn("svg", path, theme=theme, dpi=DPI, words=words, transparent=transparent)

    def to_pdf(
        self, path: str | Path | None = None, *, theme: str = "light", words: bool = True, transparent: bool = False
    ) -> bytes | Path:
        """The picture for a paper, as PDF; arguments as those of `to_png`.

        Raises:
            FileError: the file cannot be written.
        """
        return self._drawn("pdf", path, theme=theme, dpi=DPI, words=words, transparent=transparent)

    def _drawn(self, form: str, path: str | Path | None, *, words: bool, **how: Any) -> bytes | Path:
        around = None
        if words:
            caption = visible_text(" ".join([self.spec.caption, *self.spec.notes]))
            around = drawing.Words(visible_text(self.spec.title), caption, origin_line(self.spec.provenance))
        found = drawing.drawn(self.picture, self.size, form, words=around, **how)
        return found if path is None else disk.write(path, found)

    def _still(self, identity: str, picture: bytes, dark: bytes) -> str:
        """The picture and the table as HTML without scripts: what a notebook shows once nothing lives behind it."""
        table = self.data().head(TABLE_ROWS)
        return drawing.still(
            identity,
            title=self.spec.title,
            caption=" ".join([self.spec.caption, *self.spec.notes]),
            picture=base64.b64encode(picture).decode("ascii"),
            dark=base64.b64encode(dark).decode("ascii"),
            table=table,
            n_rows=len(self.data()) + self.spec.left_out,
        )

    def _bundle(self, identity: str) -> dict[str, Any]:
        places = drawing.Places()
        picture, dark = (
            drawing.png(self.picture, self.size, theme=theme, dpi=DPI, colours=colours, places=places)
            for theme, colours in (("light", self.colours), ("dark", _COLOURS_OF_DARK))
        )
        return {"text/html": self._still(identity, picture, dark), "image/png": picture, "text/plain": str(self)}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return self._bundle(_identity())

    def _ipython_display_(self) -> None:
        """Two outputs: the widget, and below it the picture, which the widget hides while it lives."""
        from IPython import get_ipython
        from IPython.display import display

        shell = get_ipython()
        if shell is None or getattr(shell, "kernel", None) is None:
            display({"text/plain": str(self)}, raw=True)
            return
        identity = _identity()
        self.widget.still = [*self.widget.still, identity]
        live = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        display({"application/vnd.jupyter.widget-view+json": live, "text/plain": repr(self)}, raw=True)
        if self._stills is None:
            self._stills = Stills(shell, self._bundle)
            self.on_select(self._followed)
        self._stills.show(identity)

    def __html__(self) -> Markup:
        return Markup(self._bundle(_identity())["text/html"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec.title})"

    def __str__(self) -> str:
        """For a terminal: title, caption, and the head of the table."""
        table = self.data()
        lines = [self.spec.title, self.spec.caption, *self.spec.notes]
        if len(table):
            lines.append(table.head(10).to_string(index=False))
        if len(table) > 10:
            left = self.spec.left_out
            has = f"the first of {len(table) + left:,}" if left else "them all"
            lines.append(f"… {len(table):,} rows; view.data() has {has}")
        return "\n".join(lines)


def _identity() -> str:
    return f"workbench-{secrets.token_hex(6)}"
