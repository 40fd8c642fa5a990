"""A plotly figure redrawn by matplotlib, for pictures: lines, bands, bars, heatmaps, histograms, boxes, shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from workbench.errors import ReportError
from workbench.tokens import plain_text
from workbench.views.base import scales
from workbench.views.base.drawing import SERIES
from workbench.views.base.selection import Selection
from workbench.views.base.spec import Array
from workbench.views.figure.chosen import mark
from workbench.views.figure.traces import axis, edges_of, errors_of, numbers, positions, title_of

_DASHES = {"dot": ":", "dash": "--", "longdash": (0, (8, 3)), "dashdot": "-.", "longdashdot": (0, (8, 3, 2, 3))}
_STEPS = {"hv": "steps-post", "vh": "steps-pre", "hvh": "steps-mid", "vhv": "steps-mid"}
_MOST_LABELS = 30  # on one axis
_WRITTEN = re.compile(r"%\{z:?([^}]*)\}")  # numbers in the cells of a heatmap
_RGB = re.compile(r"rgba?\(([^)]*)\)")
Trace = Mapping[str, Any]


def draw(
    figure: Any, data: Sequence[Trace], layout: Mapping[str, Any], kinds: Sequence[str | None], chosen: Selection
) -> None:
    """Draw the traces on an empty figure, and a mark on the point that stands for what is chosen.

    Raises:
        ReportError: a trace of a type that pictures do not have; the message names it.
    """
    odd = sorted({trace.get("type", "scatter") for trace in data} - set(_DRAW))
    if odd:
        raise ReportError(
            f"pictures cannot draw traces of type {', '.join(odd)}",
            hint=f"they draw {', '.join(sorted(_DRAW))}; to_html() shows the figure",
        )
    panels = _panels(figure, data, layout)
    for number, trace in enumerate(data):
        if trace.get("visible") in (False, "legendonly"):
            continue
        panel = panels[_pair(trace)]
        panel.draw(trace, kinds[number], number)
    for shape in layout.get("shapes", []):
        _panel_of(panels, shape).shape(shape)
    for note in layout.get("annotations", []):
        _annotate(panels, note)
    for panel in panels.values():
        panel.finish()
    mark(data, lambda trace: panels[_pair(trace)], chosen)


def colour_of(given: Any) -> Any:
    """A CSS colour as matplotlib reads it.

    >>> colour_of("rgba(255, 0, 0, 0.5)")
    (1.0, 0.0, 0.0, 0.5)
    """
    found = _RGB.fullmatch(given.strip()) if isinstance(given, str) else None
    if not found:
        return given
    shares = [float(part) for part in found[1].replace(",", " ").split()]
    return (*(share / 255 for share in shares[:3]), *shares[3:])


def _pair(trace: Trace) -> tuple[str, str]:
    return trace.get("xaxis", "x"), trace.get("yaxis", "y")


def _panels(figure: Any, data: Sequence[Trace], layout: Mapping[str, Any]) -> dict[tuple[str, str], _Panel]:
    """A panel per pair of axes: a grid by their domains, and twins for axes that lie over others."""
    pairs = list(dict.fromkeys(_pair(trace) for trace in data))
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
        panels[pair] = _Panel(place, pair, layout, data, (across, down))
    for pair, host in hosts.items():
        if pair not in panels:
            panels[pair] = _Panel(panels[host].axes.twinx(), pair, layout, data, panels[host].domain)
    return panels


class _Panel:
    """One pair of axes."""

    def __init__(
        self, axes: Any, pair: tuple[str, str], layout: Mapping[str, Any], data: Sequence[Trace], domain: Any
    ) -> None:
        self.axes, self.pair, self.layout, self.domain = axes, pair, layout, domain
        self.traces = [trace for trace in data if _pair(trace) == pair]
        self.all = data
        self.categories: dict[str, list[str]] = {}
        self.before: tuple[Array, Array] | None = None
        self.stacked: dict[float, list[float]] = {}
        self.legend: list[tuple[Any, str]] = []
        self.bars: list[tuple[Trace, Any]] = []
        for which, name in zip("xy", pair, strict=True):
            order = [str(c) for c in axis(layout, name).get("categoryarray", [])]
            given = [t[which] for t in data if name in _pair(t) and t.get(which) is not None]
            texts = [value for values in given for value in values]
            if axis(layout, name).get("type") == "category" or any(isinstance(v, str) for v in texts):
                self.categories[which] = list(dict.fromkeys([*order, *map(str, texts)]))

    def places(self, which: str, values: Any) -> Array:
        """Where values stand on an axis: categories by their number."""
        if which not in self.categories:
            return numbers(values)
        order = {name: float(i) for i, name in enumerate(self.categories[which])}
        found = [order.get(str(v), np.nan) if isinstance(v, str) or str(v) in order else float(v) for v in values]
        return np.asarray(found)

    def points(self, trace: Trace) -> tuple[Array, Array]:
        given = {which: () if trace.get(which) is None else trace[which] for which in "xy"}
        n = max(map(len, given.values()))
        x, y = (self.places(which, positions(trace, which, n)) for which in "xy")
        return x, y

    def draw(self, trace: Trace, kind: str | None, number: int) -> None:
        colour = SERIES[number % len(SERIES)]
        _DRAW[trace.get("type", "scatter")](self, trace, colour, kind)

    def label(self, trace: Trace, handle: Any) -> None:
        if trace.get("showlegend") is not False and trace.get("name"):
            self.legend.append((handle, plain_text(trace["name"])))

    def shape(self, shape: Mapping[str, Any]) -> None:
        from matplotlib.patches import Rectangle
        from matplotlib.transforms import blended_transform_factory

        line = shape.get("line", {})
        ends = {}
        within = []
        for which in "xy":
            inside = str(shape.get(f"{which}ref", which)).endswith(("domain", "paper"))
            given = [shape[f"{which}0"], shape[f"{which}1"]]
            ends[which] = numbers(given) if inside else self.places(which, given)
            within.append(self.axes.transAxes if inside else self.axes.transData)
        (x0, x1), (y0, y1) = ends["x"], ends["y"]
        style = {
            "color": colour_of(line.get("color")) or self.muted(),
            "linewidth": 0.75 * line.get("width", 1.5),
            "linestyle": _DASHES.get(line.get("dash"), "-"),
            "transform": blended_transform_factory(*within),
        }
        if shape.get("type") == "line":
            self.axes.plot([x0, x1], [y0, y1], scalex=False, scaley=False, **style)
            return
        fill = colour_of(shape.get("fillcolor")) or "none"
        style |= {"linewidth": style["linewidth"] if line.get("width", 1) else 0}
        edge = style.pop("color")
        box = Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=fill, edgecolor=edge, **style)
        box.set_alpha(shape.get("opacity"))
        self.axes.add_artist(box)

    @staticmethod
    def muted() -> Any:
        import matplotlib as mpl

        return mpl.rcParams["xtick.color"]

    def finish(self) -> None:
        for which, name in zip("xy", self.pair, strict=True):
            self._axis(which, axis(self.layout, name))
        wanted = self.layout.get("showlegend", len(self.all) > 1)
        if wanted and self.legend:
            handles, names = zip(*self.legend, strict=True)
            beside = len(names) > 4 and self.domain[0] == (0, 1)
            place: Any = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if beside else {"loc": "best"}
            self.axes.legend(handles, names, fontsize=8, **place)

    def _axis(self, which: str, about: Mapping[str, Any]) -> None:
        put = {name: getattr(self.axes, f"set_{which}{name}") for name in ("label", "scale", "lim", "ticks")}
        put["label"](title_of(about))
        if about.get("type") == "log":
            put["scale"]("log")
            getattr(self.axes, f"{which}axis").set_major_formatter(lambda value, _: f"{value:g}")
        if which in self.categories:
            names = [plain_text(name) for name in self.categories[which]]
            step = -(-len(names) // _MOST_LABELS)
            turned = which == "x" and sum(map(len, names[::step])) > 90
            put["ticks"](range(0, len(names), step), names[::step], rotation=90 if turned else 0)
        elif about.get("tickvals") is not None:
            values = numbers(about["tickvals"])
            texts = about.get("ticktext")
            put["ticks"](values, None if texts is None else [plain_text(text) for text in texts])
        given = about.get("range")
        if given is not None and None not in given:
            ends = [10.0**end for end in numbers(given)] if about.get("type") == "log" else self.places(which, given)
            put["lim"](*ends)
        elif about.get("autorange") == "reversed":
            getattr(self.axes, f"invert_{which}axis")()
        if about.get("rangemode") == "tozero" and given is None and about.get("type") != "log":
            low, high = getattr(self.axes, f"get_{which}lim")()
            put["lim"](min(low, 0), max(high, 0))


def _scatter(panel: _Panel, trace: Trace, colour: str, kind: str | None) -> None:
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
            linestyle=_DASHES.get(line.get("dash"), "-"),
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


def _fill(panel: _Panel, trace: Trace, x: Array, y: Array, stroke: Any) -> Any:
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


def _bar(panel: _Panel, trace: Trace, colour: str, kind: str | None) -> None:
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


def _heatmap(panel: _Panel, trace: Trace, colour: str, kind: str | None) -> None:
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


def _write(panel: _Panel, xs: Array, ys: Array, z: Array, cells: Any, text: Callable[[int, int], str]) -> None:
    """What each cell that is known says, in ink that can be read on its colour."""
    import matplotlib as mpl

    for (row, column), value in np.ndenumerate(z):
        if np.isfinite(value):
            ink = scales.ink_on(mpl.colors.to_hex(cells.cmap(cells.norm(value))))
            panel.axes.text(
                xs[column], ys[row], text(row, column),
                ha="center", va="center", fontsize=8, color=ink, parse_math=False, clip_on=True,
            )  # fmt: skip


def _histogram(panel: _Panel, trace: Trace, colour: str, kind: str | None) -> None:
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


def _box(panel: _Panel, trace: Trace, colour: str, kind: str | None) -> None:
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


def _panel_of(panels: Mapping[tuple[str, str], _Panel], part: Mapping[str, Any]) -> _Panel:
    """The panel whose axes a shape or annotation names; the first one for the paper."""
    names = [str(part.get(f"{which}ref", which)).split(" ")[0] for which in "xy"]
    for pair, panel in panels.items():
        if all(name in (own, "paper") for name, own in zip(names, pair, strict=True)):
            return panel
    return next(iter(panels.values()))


def _annotate(panels: Mapping[tuple[str, str], _Panel], note: Mapping[str, Any]) -> None:
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


_DRAW = {"scatter": _scatter, "bar": _bar, "heatmap": _heatmap, "histogram": _histogram, "box": _box}
