"""A mark on the first point of a figure that stands for what is chosen, as the chart's cursor finds it in a browser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from workbench.views.base import scales
from workbench.views.base.selection import Selection
from workbench.views.figure.traces import GRIDS, edges_of, positions, selects

Trace = Mapping[str, Any]


def mark(data: Sequence[Trace], panel_of: Callable[[Trace], Any], chosen: Selection) -> None:
    """Mark the point on the panel of its trace; nothing where no point stands for what is chosen."""
    if not chosen:
        return
    for trace in data:
        if trace.get("visible") in (False, "legendonly") or trace.get("hoverinfo") == "skip":
            continue
        for index in _points(trace):
            if _stands_for(selects(trace, index), chosen):
                return _mark(panel_of(trace), trace, index)


def _points(trace: Trace) -> list[Any]:
    given = trace.get("customdata")
    if given is None:
        return []
    if trace.get("type") in GRIDS:
        return [(row, column) for row, cells in enumerate(given) for column in range(len(cells))]
    return list(range(len(given))) if trace.get("type", "scatter") in ("scatter", "bar") else []


def _stands_for(point: Mapping[str, Any], chosen: Selection) -> bool:
    now = {name: list(chosen.heads) if name == "heads" else getattr(chosen, name) for name in point}
    return point == now and any(value not in (None, []) for value in now.values())


def _mark(panel: Any, trace: Trace, index: Any) -> None:
    bars = next((bars for each, bars in panel.bars if each is trace), None)
    if bars is not None:
        bars.patches[index].set(edgecolor=scales.accent(), linewidth=2, zorder=3)
    elif isinstance(index, tuple):
        row, column = index
        shape = np.shape(trace["z"])
        sizes = {"x": shape[1], "y": shape[0]}
        xs, ys = (edges_of(panel.places(which, positions(trace, which, n)), n) for which, n in sizes.items())
        (left, right), (low, high) = xs[column : column + 2].tolist(), ys[row : row + 2].tolist()
        panel.axes.add_patch(scales.frame_of(left, low, right - left, high - low))
    else:
        x, y = panel.points(trace)
        look = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": scales.accent(), "markeredgewidth": 2}
        panel.axes.plot(x[index], y[index], "o", zorder=5, **look)
