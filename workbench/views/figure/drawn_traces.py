"""Traces of a plotly figure drawn by matplotlib: lines, bands, bars, heatmaps, histograms, boxes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from workbench.tokens import plain_text
from workbench.views.base import scales
from workbench.views.base.spec import Array
from workbench.views.figure.panel import DASHES, Panel, Trace, colour_of
from workbench.views.figure.traces import edges_of, errors_of, numbers, positions, title_of

_STEPS = {"hv": "steps-post", "vh": "steps-pre", "hvh": "steps-mid", "vhv": "steps-mid"}
_WRITTEN = re.compile(r"%\{z:?([^}]*)\}")  # numbers in the cells of a heatmap


def _scatter(panel: Panel, trace: Trace, colour: str, kind: str | None) -> None:
    x, y = panel.points(trace)
    line, marker = trace.get("line", {}), trace.get("marker", {})
    mode = trace.get("mode", "lines" if len(x) > 20 else "lines+markers")
    own = marker.get("color")
    stroke = colour_of(line.get("color") or (own if isinstance(own, str) else None) or colour)
    filled = _fill(panel, trace, x, y, stroke)
    panel.before = (x, y)
    handle = filled
    if "lines" in mode and line.get("width", 2) > 0:
        (handle,) = panel.axes.plot(
            x,
            y,
            color=stroke,
            linewidth=0.75 * line.get("width", 2),
            linestyle=DASHES.get(line.get("dash"), "-"),
            drawstyle=_STEPS.get(line.get("shape"), "default"),
            alpha=trace.get("opacity"),
        )
    if "markers" in mode:
        size = marker.get("size", 6)
        area = (0.75 * numbers(size if isinstance(size, (list, np.ndarray)) else [size])) ** 2
        colours: Any = stroke if own is None or isinstance(own, str) else own
        if isinstance(colours, list) and any(isinstance(c, str) for c in colours):
            colours = [colour_of(c) for c in colours]
        scale = _map_of(marker.get("colorscale"), None)
        look = {"color": colours} if isinstance(colours, str | tuple) else {"c": colours, "cmap": scale}
        dots = panel.axes.scatter(x, y, s=area, alpha=trace.get("opacity"), zorder=3, **look)
        handle = dots if handle is None or handle is filled else handle
    if "text" in mode:
        inside = trace.get("textposition") == "middle center"
        place: dict[str, Any] = {"xytext": (0, 0), "ha": "center", "va": "center"} if inside else {"xytext": (3, 3)}
        if isinstance(paint := trace.get("textfont", {}).get("color"), str):
            place["color"] = colour_of(paint)
        for px, py, text in zip(x, y, trace.get("text", ()), strict=False):
            panel.axes.annotate(
                plain_text(text), (px, py), textcoords="offset points", fontsize=7 if inside else 8, zorder=4, **place
            )
    bars = {which: errors_of(trace, which, len(x)) for which in "xy"}
    if any(bars.values()):
        panel.axes.errorbar(x, y, fmt="none", ecolor=stroke, elinewidth=1, capsize=2.5, **_lengths(bars))
    if handle is not None:
        panel.label(trace, handle)


def _lengths(bars: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{which}err": np.stack(found) for which, found in bars.items() if found is not None}


def _fill(panel: Panel, trace: Trace, x: Array, y: Array, stroke: Any) -> Any:
    import matplotlib as mpl

    fill = trace.get("fill", "none")
    if fill == "none":
        return None
    given = trace.get("fillcolor")
    paint = colour_of(given) if given else (*mpl.colors.to_rgb(stroke), 0.25)
    look = {"facecolor": paint, "edgecolor": "none", "zorder": 1}
    if fill == "tonexty" and panel.before is not None:
        across, other = panel.before
        if len(across) == len(x) and np.array_equal(across, x):
            return panel.axes.fill_between(x, y, other, **look)
        return panel.axes.fill(np.concatenate([x, across[::-1]]), np.concatenate([y, other[::-1]]), **look)[0]
    if fill in ("tozeroy", "tonexty"):
        return panel.axes.fill_between(x, y, 0, **look)
    if fill in ("tozerox", "tonextx"):
        return panel.axes.fill_betweenx(y, x, panel.before[0] if fill == "tonextx" and panel.before else 0, **look)
    return panel.axes.fill(x, y, **look)[0]


def _bar(panel: Panel, trace: Trace, colour: str, kind: str | None) -> None:
    lying = trace.get("orientation") == "h"
    x, y = panel.points(trace)
    at, height = (y, x) if lying else (x, y)
    bars = [t for t in panel.traces if t.get("type") == "bar"]
    mode = panel.layout.get("barmode", "group")
    steps = np.diff(np.unique(at[np.isfinite(at)]))
    room = (1 - panel.layout.get("bargap", 0.2)) * (float(steps.min()) if len(steps) else 1.0)
    base = np.zeros_like(height)
    if mode == "group":
        room /= len(bars)
        at = at + room * (next(i for i, t in enumerate(bars) if t is trace) - (len(bars) - 1) / 2)
    elif mode in ("stack", "relative"):
        for i, (place, tall) in enumerate(zip(at, height, strict=True)):
            ends = panel.stacked.setdefault(float(place), [0.0, 0.0])  # below zero, above zero
            base[i] = ends[int(tall >= 0)]
            ends[int(tall >= 0)] += float(tall) if np.isfinite(tall) else 0.0
    own = trace.get("marker", {}).get("color")
    paint = [colour_of(c) for c in own] if isinstance(own, list) else colour_of(own) if isinstance(own, str) else colour
    if isinstance(own, np.ndarray):
        paint = list(_map_of(trace["marker"].get("colorscale"), None)(_share(own)))
    look = {"color": paint, "alpha": trace.get("opacity")}
    if lying:
        handle = panel.axes.barh(at, height, room, left=base, **look)
    else:
        handle = panel.axes.bar(at, height, room, bottom=base, **look)
    panel.bars.append((trace, handle))
    which = "x" if lying else "y"
    found = errors_of(trace, which, len(at))
    if found is not None:
        tips = (height + base, at) if lying else (at, height + base)
        ink = panel.axes.xaxis.label.get_color()
        panel.axes.errorbar(*tips, fmt="none", ecolor=ink, elinewidth=1, capsize=2.5, **_lengths({which: found}))
    if not lying and not (panel.layout.get("shapes")):
        panel.axes.margins(x=0.02)
    panel.label(trace, handle)


def _share(values: Any) -> Array:
    found = numbers(values)
    low, high = float(np.nanmin(found)), float(np.nanmax(found))
    return (found - low) / (high - low or 1.0)


def _map_of(colours: Any, kind: str | None) -> Any:
    """A colour map: of the trace, or the theme's."""
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap

    if kind == "diverging":
        made = scales.diverging()
    elif not isinstance(colours, list):
        made = scales.sequential()
    else:
        stops = [(float(at), mpl.colors.to_rgba(colour_of(colour))) for at, colour in colours]
        made = LinearSegmentedColormap.from_list("own", stops)
    return made.with_extremes(bad=scales.unseen_colour())


def _heatmap(panel: Panel, trace: Trace, colour: str, kind: str | None) -> None:
    z = numbers(trace["z"])
    xs, ys = (panel.places(which, positions(trace, which, n)) for which, n in (("x", z.shape[1]), ("y", z.shape[0])))
    shared = panel.layout.get(trace["coloraxis"], {}) if trace.get("coloraxis") else {}
    limits = {
        "vmin": trace.get("zmin", shared.get("cmin")),
        "vmax": trace.get("zmax", shared.get("cmax")),
    }
    scale = trace.get("colorscale", shared.get("colorscale"))
    edges = (edges_of(xs, z.shape[1]), edges_of(ys, z.shape[0]))
    cells = panel.axes.pcolormesh(*edges, np.ma.masked_invalid(z), cmap=_map_of(scale, kind), **limits)
    if trace.get("reversescale", False):
        cells.set_cmap(cells.get_cmap().reversed())
    if trace.get("showscale") is not False:
        bar = panel.axes.figure.colorbar(cells, ax=panel.axes, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(title_of(trace.get("colorbar", shared.get("colorbar", {}))))
    panel.axes.set_facecolor(scales.unseen_colour())
    written, texts = _WRITTEN.fullmatch(trace.get("texttemplate", "")), trace.get("text")
    if written:
        _write(panel, xs, ys, z, cells, lambda row, column: f"{z[row, column]:{written[1]}}".replace("-", "−"))
    elif trace.get("texttemplate") == "%{text}" and texts is not None:
        _write(panel, xs, ys, z, cells, lambda row, column: plain_text(texts[row][column]))


def _write(panel: Panel, xs: Array, ys: Array, z: Array, cells: Any, text: Callable[[int, int], str]) -> None:
    """What each cell that is known says, in ink that can be read on its colour."""
    import matplotlib as mpl

    for (row, column), value in np.ndenumerate(z):
        if np.isfinite(value):
            ink = scales.ink_on(mpl.colors.to_hex(cells.cmap(cells.norm(value))))
            panel.axes.text(
                xs[column], ys[row], text(row, column),
                ha="center", va="center", fontsize=8, color=ink, parse_math=False, clip_on=True,
            )  # fmt: skip


def _histogram(panel: Panel, trace: Trace, colour: str, kind: str | None) -> None:
    lying = trace.get("x") is None
    which = "y" if lying else "x"
    values = panel.places(which, trace[which])
    known = values[np.isfinite(values)]
    given = trace.get(f"{which}bins", {})
    if which in panel.categories:
        bins: Any = np.arange(len(panel.categories[which]) + 1) - 0.5
    elif given.get("size"):
        start = given.get("start", float(known.min()) if len(known) else 0.0)
        end = given.get("end", float(known.max()) if len(known) else 1.0)
        bins = np.arange(start, end + given["size"], given["size"])
    else:
        bins = trace.get(f"nbins{which}") or "auto"
    norm = trace.get("histnorm", "")
    counts, edges = np.histogram(known, bins=bins)
    shown = counts.astype(float)
    if norm in ("probability", "percent", "probability density"):
        shown /= max(1, counts.sum()) / (100 if norm == "percent" else 1)
    if norm in ("density", "probability density"):
        shown /= np.diff(edges)
    own = trace.get("marker", {}).get("color")
    look = {"color": colour_of(own) if isinstance(own, str) else colour, "alpha": trace.get("opacity")}
    widths = 0.96 * np.diff(edges)
    middles = (edges[1:] + edges[:-1]) / 2
    if lying:
        handle = panel.axes.barh(middles, shown, widths, **look)
    else:
        handle = panel.axes.bar(middles, shown, widths, **look)
    panel.label(trace, handle)


def _box(panel: Panel, trace: Trace, colour: str, kind: str | None) -> None:
    lying = trace.get("y") is None or trace.get("orientation") == "h"
    along, across = ("x", "y") if lying else ("y", "x")
    values = panel.places(along, trace[along])
    groups = panel.places(across, trace[across]) if trace.get(across) is not None else None
    if groups is None:
        boxes = [t for t in panel.traces if t.get("type") == "box" and t.get(across) is None]
        here = float(next(i for i, t in enumerate(boxes) if t is trace))
        names = panel.categories.setdefault(across, [])
        names.append(str(trace.get("name", f"trace {len(names)}")))
        groups = np.full(len(values), here)
    places = sorted(set(groups[np.isfinite(groups)]))
    own = trace.get("marker", {}).get("color") or trace.get("line", {}).get("color")
    paint = colour_of(own) if isinstance(own, str) else colour
    line = {"color": paint, "linewidth": 1.3}
    made = panel.axes.boxplot(
        [values[(groups == place) & np.isfinite(values)] for place in places],
        positions=places,
        widths=0.5,
        orientation="horizontal" if lying else "vertical",
        manage_ticks=False,
        boxprops=line,
        whiskerprops=line,
        capprops=line,
        medianprops=line,
        flierprops={"marker": "o", "markersize": 3, "markerfacecolor": paint, "markeredgecolor": "none"},
    )
    panel.label(trace, made["boxes"][0])


DRAW = {"scatter": _scatter, "bar": _bar, "heatmap": _heatmap, "histogram": _histogram, "box": _box}
"""By type of trace: what draws it in a panel, in a colour; `kind` tells which of the theme's scales a heatmap has."""
