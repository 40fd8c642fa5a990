"""Views of what studies show: maps, lines, bars and crystals side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from workbench.mechanisms.studies import Atoms, Bars, Exhibit, Heat, Lines
from workbench.tokens import plotly_text
from workbench.views.base.drawing import SERIES
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import figure

_OUTLINE = "#d1662b"
_SHADE = "rgba(128, 128, 128, 0.22)"
_LINKS = 2  # of each atom, the strongest
_ACROSS = 4  # maps in a row
_ROOM = 1.0  # ångström around a crystal
_INKS = {"O": "#b03a4a", "Fe": "#8a6d1f", "Cu": "#d1662b", "Y": "#3a8f5c", "Ba": "#7a6bc9"}


def _view_of_exhibit(found: Exhibit) -> View:
    """Its panels; more than a row of maps stand in rows."""
    from plotly.subplots import make_subplots

    n = len(found.panels)
    maps = all(isinstance(each, Heat) for each in found.panels)
    columns = n if n <= _ACROSS or not maps else _ACROSS - 1
    rows = -(-n // columns)
    titles = [plotly_text(_titled(each)) for each in found.panels]
    fig = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.05 if maps else 0.09)
    named: set[str] = set()
    for i, each in enumerate(found.panels):
        _draw(each, fig, {"row": i // columns + 1, "col": i % columns + 1}, named)
    legend = {"orientation": "h", "y": -0.25, "x": 0}
    fig.update_layout(height=60 + rows * (230 if maps else 280), margin={"t": 40}, legend=legend)
    return figure(fig, title=found.title, caption=found.about)


def _titled(panel: Any) -> str:
    """The title; of a map of numbers of one sign with its least and greatest, from which its colours go."""
    if not isinstance(panel, Heat) or (ends := _ends(panel.values)) is None:
        return str(panel.title)
    return f"{panel.title}: {ends[0]:.2g} to {ends[1]:.2g}"


def _ends(values: Tensor) -> tuple[float, float] | None:
    """The least and the greatest number; None where there are some below zero, or none at all."""
    there = values.detach().double()[~values.isnan()]
    return None if not len(there) or float(there.min()) < 0 else (float(there.min()), float(there.max()))


@singledispatch
def _draw(panel: Any, fig: Any, at: dict[str, int], named: set[str]) -> None:
    raise TypeError(f"{type(panel).__name__} is no panel")


@_draw.register
def _heat(panel: Heat, fig: Any, at: dict[str, int], named: set[str]) -> None:
    values = panel.values.detach().double()
    down, across = values.shape
    ends = _ends(values)
    limits = {} if ends is None else {"zmin": ends[0], "zmax": ends[1]}
    fig.add_heatmap(z=values.numpy(), showscale=False, name=plotly_text(panel.title), **limits, **at)
    fig.update_xaxes(**_axis(panel.columns, across, panel.column_texts), **at)
    fig.update_yaxes(**_axis(panel.rows, down, panel.row_texts), autorange="reversed", **at)
    for top, left, height, width in panel.boxes:
        corners = {"x0": left - 0.5, "x1": left + width - 0.5, "y0": top - 0.5, "y1": top + height - 0.5}
        fig.add_shape(type="rect", line={"color": _OUTLINE, "width": 2}, **corners, **at)


def _axis(title: str, n: int, texts: Sequence[str]) -> dict[str, Any]:
    """Title and ticks of an axis of n cells."""
    named = {"title_text": plotly_text(title)} if title else {}
    if texts:
        return {**named, "tickvals": list(range(n)), "ticktext": [plotly_text(text) for text in texts]}
    return {**named, "tickvals": list(range(0, n, max(1, n // 4)))}


@_draw.register
def _lines(panel: Lines, fig: Any, at: dict[str, int], named: set[str]) -> None:
    import plotly.graph_objects as go

    for i, (name, y) in enumerate(panel.y.items()):
        fig.add_trace(
            go.Scatter(
                x=list(panel.x), y=y.detach().double().numpy(), name=plotly_text(name), legendgroup=name,
                showlegend=len(panel.y) > 1 and name not in named, line={"color": SERIES[i % len(SERIES)], "width": 2},
            ), **at,
        )  # fmt: skip
        named.add(name)
    low = min([0.0, *(float(y.min()) for y in panel.y.values())])
    high = max(float(y.max()) for y in panel.y.values())
    for start, stop, _ in panel.spans:
        ends = {"x0": start, "x1": stop, "y0": low, "y1": high}
        fig.add_shape(type="rect", fillcolor=_SHADE, line={"width": 0}, layer="below", **ends, **at)
    fig.update_xaxes(title_text=plotly_text(panel.across), **at)
    fig.update_yaxes(title_text=plotly_text(panel.up), rangemode="tozero", **at)


@_draw.register
def _bars(panel: Bars, fig: Any, at: dict[str, int], named: set[str]) -> None:
    import plotly.graph_objects as go

    for i, (kind, values) in enumerate(panel.values.items()):
        names = [plotly_text(name) for name in panel.names]
        paint = {"color": SERIES[i % len(SERIES)]}
        fig.add_trace(
            go.Bar(x=names, y=list(values), name=plotly_text(kind), marker=paint, showlegend=len(panel.values) > 1),
            **at,
        )
    fig.update_xaxes(type="category", **at)
    fig.update_yaxes(title_text=plotly_text(panel.up), **at)


@_draw.register
def _atoms(panel: Atoms, fig: Any, at: dict[str, int], named: set[str]) -> None:
    import plotly.graph_objects as go

    flat = flattened(panel.positions)
    weights = panel.links.detach().double().clone().fill_diagonal_(0.0)
    top = float(weights.max()) or 1.0
    for i, j in strongest(weights):
        fig.add_trace(
            go.Scatter(
                x=flat[[i, j], 0].tolist(), y=flat[[i, j], 1].tolist(), mode="lines", hoverinfo="skip",
                showlegend=False, line={"color": "#808890", "width": 0.5 + 3.5 * float(weights[i, j]) / top},
            ), **at,
        )  # fmt: skip
    sizes = panel.sizes.detach().double()
    for element in dict.fromkeys(panel.elements):
        which = [i for i, each in enumerate(panel.elements) if each == element]
        fig.add_trace(
            go.Scatter(
                x=flat[which, 0].tolist(), y=flat[which, 1].tolist(), mode="markers+text", name=plotly_text(element),
                text=[plotly_text(element)] * len(which), textposition="middle center", textfont={"color": "#ffffff"},
                legendgroup=element, showlegend=False,
                marker={"size": [18 + 40 * float(sizes[i]) for i in which], "color": _INKS.get(element, SERIES[0])},
                customdata=[[float(sizes[i])] for i in which],
                hovertemplate="%{text}: %{customdata[0]:.2f}<extra></extra>",
            ), **at,
        )  # fmt: skip
    low, high = (flat.amin(0) - _ROOM).tolist(), (flat.amax(0) + _ROOM).tolist()
    fig.update_xaxes(title_text="Å", range=[low[0], high[0]], **at)
    fig.update_yaxes(range=[low[1], high[1]], **at)


def flattened(positions: Tensor) -> Tensor:
    """[atom, 2]: where atoms stand, seen so that they lie as far apart as can be.

    >>> flattened(torch.tensor([[0.0, 0, 0], [0, 0, 2]])).abs().round(decimals=3).tolist()
    [[1.0, 0.0], [1.0, 0.0]]
    """
    away = positions.detach().double() - positions.double().mean(0)
    _, _, axes = torch.linalg.svd(away, full_matrices=True)
    return away @ axes[:2].mT


def strongest(weights: Tensor) -> list[tuple[int, int]]:
    """(from, to) of each atom's strongest weights."""
    found = weights.topk(min(_LINKS, len(weights) - 1), dim=1).indices if len(weights) > 1 else weights.new_zeros(0, 0)
    return [(i, int(j)) for i, row in enumerate(found) for j in row]


register(Exhibit, _view_of_exhibit)
