"""A plotly figure redrawn by matplotlib, for pictures: lines, bands, bars, heatmaps, histograms, boxes, shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.errors import ReportError
from workbench.tokens import plain_text
from workbench.views.base.drawing import SERIES
from workbench.views.base.selection import Selection
from workbench.views.figure.chosen import mark
from workbench.views.figure.drawn_traces import DRAW
from workbench.views.figure.panel import Panel, Trace, pair_of
from workbench.views.figure.traces import axis


def draw(
    figure: Any, data: Sequence[Trace], layout: Mapping[str, Any], kinds: Sequence[str | None], chosen: Selection
) -> None:
    """Draw the traces on an empty figure, and a mark on the point that stands for what is chosen.

    Raises:
        ReportError: a trace of a type that pictures do not have; the message names it.
    """
    odd = sorted({trace.get("type", "scatter") for trace in data} - set(DRAW))
    if odd:
        raise ReportError(
            f"pictures cannot draw traces of type {', '.join(odd)}",
            hint=f"they draw {', '.join(sorted(DRAW))}; to_html() shows the figure",
        )
    panels = _panels(figure, data, layout)
    for number, trace in enumerate(data):
        if trace.get("visible") in (False, "legendonly"):
            continue
        DRAW[trace.get("type", "scatter")](panels[pair_of(trace)], trace, SERIES[number % len(SERIES)], kinds[number])
    for shape in layout.get("shapes", []):
        _panel_of(panels, shape).shape(shape)
    for note in layout.get("annotations", []):
        _annotate(panels, note)
    for panel in panels.values():
        panel.finish()
    mark(data, lambda trace: panels[pair_of(trace)], chosen)


def _panels(figure: Any, data: Sequence[Trace], layout: Mapping[str, Any]) -> dict[tuple[str, str], Panel]:
    """A panel per pair of axes: a grid by their domains, and twins for axes that lie over others."""
    pairs = list(dict.fromkeys(pair_of(trace) for trace in data))
    hosts = {pair: (pair[0], axis(layout, pair[1]).get("overlaying", pair[1])) for pair in pairs}
    own = list(dict.fromkeys(hosts.values()))
    spans = {pair: [tuple(axis(layout, name).get("domain", (0, 1))) for name in pair] for pair in own}
    columns = sorted({span[0] for span in spans.values()})
    rows = sorted({span[1] for span in spans.values()}, reverse=True)
    grid = figure.add_gridspec(
        len(rows), len(columns), width_ratios=[b - a for a, b in columns], height_ratios=[b - a for a, b in rows]
    )
    panels = {}
    for pair in own:
        across, down = spans[pair]
        place = figure.add_subplot(grid[rows.index(down), columns.index(across)])
        panels[pair] = Panel(place, pair, layout, data, (across, down))
    for pair, host in hosts.items():
        if pair not in panels:
            panels[pair] = Panel(panels[host].axes.twinx(), pair, layout, data, panels[host].domain)
    return panels


def _panel_of(panels: Mapping[tuple[str, str], Panel], part: Mapping[str, Any]) -> Panel:
    """The panel whose axes a shape or annotation names; the first one for the paper."""
    names = [str(part.get(f"{which}ref", which)).split(" ")[0] for which in "xy"]
    for pair, panel in panels.items():
        if all(name in (own, "paper") for name, own in zip(names, pair, strict=True)):
            return panel
    return next(iter(panels.values()))


def _annotate(panels: Mapping[tuple[str, str], Panel], note: Mapping[str, Any]) -> None:
    from matplotlib.transforms import blended_transform_factory

    text = plain_text(note.get("text", ""))
    if note.get("xref") == note.get("yref") == "paper":
        for panel in panels.values():  # the titles that make_subplots writes stand above the middle of their panel
            (left, right), (_, top) = panel.domain
            if abs((left + right) / 2 - note.get("x", 0)) < 0.01 and abs(top - note.get("y", 0)) < 0.05:
                panel.axes.set_title(text)
                return
    panel = _panel_of(panels, note)
    places, within = [], []
    for which, name in zip("xy", panel.pair, strict=True):
        inside = str(note.get(f"{which}ref", which)).endswith(("domain", "paper"))
        value = note.get(which, 0)
        if not inside and axis(panel.layout, name).get("type") == "log":
            value = 10.0 ** float(value)  # annotations stand at the exponent, unlike shapes
        places.append(float(value) if inside else float(panel.places(which, [value])[0]))
        within.append(panel.axes.transAxes if inside else panel.axes.transData)
    sides = {"left": "left", "right": "right", "center": "center", "auto": "center"}
    ups = {"top": "top", "bottom": "bottom", "middle": "center", "auto": "bottom"}
    panel.axes.text(
        *places,
        text,
        transform=blended_transform_factory(*within),
        ha=sides[note.get("xanchor", "auto")],
        va=ups[note.get("yanchor", "auto")],
        fontsize=8,
    )
