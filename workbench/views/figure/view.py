"""Figure: the host of all charts. A plotly figure, live and on a page, with points to click and to walk by keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.errors import ReportError
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View
from workbench.views.figure import picture as plotly_picture
from workbench.views.figure import traces as parts

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.figure import Figure as Picture

_HEIGHT = 420  # pixels


@dataclass(frozen=True)
class Click:
    """A point that was clicked, or chosen by Enter.

    Attributes:
        trace: number of its trace. name: the trace's name. index: of the point; (row, column) in a heatmap.
        x, y: where it stands. selects: what it chose in the shared selection.
    """

    trace: int
    name: str
    index: int | tuple[int, int]
    x: Any
    y: Any
    selects: Mapping[str, Any]


class Figure(View):
    """See `figure`."""

    def __init__(self, spec: ViewSpec, selection: SharedSelection | None = None) -> None:
        super().__init__(spec, selection)
        layout = spec.facts["figure"]["layout"]
        self.size = (layout.get("width", 800) / 100, layout.get("height", _HEIGHT) / 100)
        self._callbacks: list[Callable[[Click], object]] = []

    @cached_property
    def _whole(self) -> Any:
        return parts.put_together(self.spec.facts["figure"], self.spec.blocks)

    def picture(self, figure: Picture) -> None:
        whole = self._whole
        plotly_picture.draw(figure, whole["data"], whole["layout"], self.spec.facts["scales"], self.chosen)

    def on_click(self, callback: Callable[[Click], object]) -> Callable[[], None]:
        """Call back with every point that is clicked in a notebook; what is returned ends that."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback) if callback in self._callbacks else None

    def answer(self, question: Mapping[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        if question.get("ask") != "clicked":
            return super().answer(question)
        click = self._click(question)
        for callback in list(self._callbacks):
            callback(click)
        return {}, []

    def _click(self, question: Mapping[str, Any]) -> Click:
        number, index = question.get("trace"), question.get("index")
        data = self._whole["data"]
        if not isinstance(number, int) or not 0 <= number < len(data):
            raise ReportError(f"there is no trace {number!r}")
        trace = data[number]
        at: Any = tuple(index) if isinstance(index, list) else index
        if not all(isinstance(i, int) and i >= 0 for i in (at if isinstance(at, tuple) else (at,))):
            raise ReportError(f"trace {number} has no point {index!r}")
        try:
            chosen = parts.selects(trace, at)
        except (IndexError, TypeError):
            raise ReportError(f"trace {number} has no point {index!r}") from None
        return Click(number, trace.get("name", ""), at, question.get("x"), question.get("y"), chosen)


_BAND = "rgba(128, 128, 128, 0.25)"


def figure(
    fig: go.Figure,
    *,
    title: str,
    caption: str,
    table: pd.DataFrame | Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    provenance: Mapping[str, Any] | None = None,
    selection: SharedSelection | None = None,
) -> Figure:
    """A plotly figure as a view.

    The theme gives background, fonts, grid and the colours of traces that have none of their own; the figure's template
    and title are left out. A heatmap without a colour scale gets one that starts at 0, or lies around it where values
    are negative. Every text from outside (tokens, names of prompts) must go through `workbench.tokens.plotly_text`,
    since plotly reads text as HTML.

    A click chooses in the shared selection what the trace says: `meta={"select": ["layer", "heads"]}` names columns of
    `customdata`, whole numbers from 0, -1 for none ("site" is text). A trace with hoverinfo="skip" is no stop for keys
    and not in the table: a band around a line.

    Args:
        table: columns for the data table and the file; made from the traces if None.

    Raises:
        ReportError: no figure, no traces, a trace type that pages cannot draw, or customdata that does not fit `meta`.

    >>> import plotly.graph_objects as go
    >>> lines = go.Figure(go.Scatter(x=[1, 2], y=[0.5, 0.25], name="loss"))
    >>> figure(lines, title="Loss", caption="Loss by epoch.").data()
         x     y
    0  1.0  0.50
    1  2.0  0.25
    """
    held, blocks = parts.take_apart(fig)
    kinds = parts.set_scales(held, blocks)
    whole = parts.put_together(held, blocks)
    for number, trace in enumerate(whole["data"]):
        parts.check_selects(number, trace)
    said = list(notes)
    if table is None:
        columns, cut = parts.table_of(whole["data"], whole["layout"])
        if cut:
            said.append(f"The table holds the first {parts.TABLE_ROWS:,} points; the JSON download holds all.")
    else:
        columns = columns_of_table(table)
    spec = ViewSpec(
        kind="figure",
        title=title,
        caption=caption,
        facts={"figure": held, "scales": kinds, "height": held["layout"].get("height", _HEIGHT)},
        blocks=blocks,
        table=columns,
        notes=tuple(said),
        provenance=provenance or {},
    )
    return Figure(spec, selection)


def columns_of_table(table: pd.DataFrame | Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as arrays, everything else as text."""
    frame = table if isinstance(table, pd.DataFrame) else pd.DataFrame(dict(table))
    columns: dict[str, Any] = {}
    for name, column in frame.items():
        numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
        if not numeric:
            columns[str(name)] = ["–" if pd.isna(value) is True else str(value) for value in column]
        elif column.dtype == "float32" or str(column.dtype).startswith(("int", "uint")):
            columns[str(name)] = column.to_numpy()
        else:
            columns[str(name)] = column.to_numpy(dtype="float64", na_value=float("nan"))
    return columns


def band(x: list[float], low: Any, high: Any) -> Any:
    """A grey band between two curves, such as an interval, as a plotly trace."""
    import plotly.graph_objects as go

    return go.Scatter(
        x=[*x, *reversed(x)], y=[*high, *reversed(list(low))], fill="toself", fillcolor=_BAND, line={"width": 0},
        mode="lines", hoverinfo="skip", showlegend=False, name="interval",
    )  # fmt: skip
