"""One pair of axes of a plotly figure in matplotlib: where values stand, shapes, ticks, limits, the legend."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workbench.tokens import plain_text
from workbench.views.base.spec import Array
from workbench.views.figure.traces import axis, numbers, positions, title_of

DASHES = {"dot": ":", "dash": "--", "longdash": (0, (8, 3)), "dashdot": "-.", "longdashdot": (0, (8, 3, 2, 3))}
_MOST_LABELS = 30  # on one axis
_RGB = re.compile(r"rgba?\(([^)]*)\)")
Trace = Mapping[str, Any]


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


def pair_of(trace: Trace) -> tuple[str, str]:
    """The names of a trace's axes."""
    return trace.get("xaxis", "x"), trace.get("yaxis", "y")


class Panel:
    """One pair of axes."""

    def __init__(
        self, axes: Any, pair: tuple[str, str], layout: Mapping[str, Any], data: Sequence[Trace], domain: Any
    ) -> None:
        self.axes, self.pair, self.layout, self.domain = axes, pair, layout, domain
        self.traces = [trace for trace in data if pair_of(trace) == pair]
        self.all = data
        self.categories: dict[str, list[str]] = {}
        self.before: tuple[Array, Array] | None = None
        self.stacked: dict[float, list[float]] = {}
        self.legend: list[tuple[Any, str]] = []
        self.bars: list[tuple[Trace, Any]] = []
        for which, name in zip("xy", pair, strict=True):
            order = [str(c) for c in axis(layout, name).get("categoryarray", [])]
            given = [t[which] for t in data if name in pair_of(t) and t.get(which) is not None]
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
            "linestyle": DASHES.get(line.get("dash"), "-"),
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
            step = max(1, -(-len(names) // _MOST_LABELS))
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
