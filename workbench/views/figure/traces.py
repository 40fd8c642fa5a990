"""A plotly figure taken apart: its JSON with the arrays as blocks, its points as a table, what a click chooses."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from workbench.errors import ReportError
from workbench.tokens import plain_text
from workbench.views.base import scales
from workbench.views.base.selection import Selection
from workbench.views.base.spec import Array

GRIDS = ("heatmap", "contour")
DRAWABLE = (*GRIDS, "bar", "box", "histogram", "histogram2d", "histogram2dcontour", "image", "scatter", "violin")
TABLE_ROWS = 10_000
"""Rows of a table that is made from the traces; the JSON of the page has every number."""


def take_apart(fig: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """{"data", "layout"} in which {"block": name} stands for an array, and the arrays.

    Raises:
        ReportError: no plotly figure, one without traces, or with something that a page cannot draw.
    """
    if not hasattr(fig, "to_plotly_json") or not hasattr(fig, "to_json"):
        raise ReportError(f"this is a {type(fig).__name__}, not a plotly figure", hint="pass a plotly go.Figure")
    held = json.loads(fig.to_json())
    odd = sorted({trace.get("type", "scatter") for trace in held["data"]} - set(DRAWABLE))
    if not held["data"]:
        raise ReportError("the figure has no traces")
    if odd:
        raise ReportError(
            f"pages cannot draw traces of type {', '.join(odd)}", hint=f"they draw {', '.join(sorted(DRAWABLE))}"
        )
    if held.get("frames"):
        raise ReportError("pages cannot play the frames of a figure", hint="pass one figure per frame")
    layout = held.get("layout", {})
    sources = [image.get("source", "") for image in [*layout.get("images", []), *held["data"]]]
    if any(isinstance(source, str) and source and not source.startswith("data:") for source in sources):
        raise ReportError("the figure holds an image that would be fetched", hint="embed it as a data: address")
    for given in ("template", "title", "paper_bgcolor", "plot_bgcolor"):  # the theme's, and the view has a title
        layout.pop(given, None)
    blocks: dict[str, Array] = {}
    return _without_arrays({"data": held["data"], "layout": layout}, blocks), blocks


def _without_arrays(value: Any, blocks: dict[str, Array]) -> Any:
    if isinstance(value, list):
        return [_without_arrays(item, blocks) for item in value]
    if not isinstance(value, dict):
        return value
    if "bdata" not in value:
        return {key: _without_arrays(item, blocks) for key, item in value.items()}
    array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=np.dtype(value["dtype"]).newbyteorder("<"))
    shape = str(value.get("shape", array.size))
    blocks[f"a{len(blocks)}"] = array.reshape([int(n) for n in shape.split(",")]).copy()
    return {"block": f"a{len(blocks) - 1}"}


def put_together(value: Any, blocks: Mapping[str, Array]) -> Any:
    """What `take_apart` gave, with the arrays in their places."""
    if isinstance(value, list):
        return [put_together(item, blocks) for item in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"block"}:
        return blocks[value["block"]]
    return {key: put_together(item, blocks) for key, item in value.items()}


def set_scales(figure: dict[str, Any], blocks: Mapping[str, Array]) -> list[str | None]:
    """Give every heatmap without a colour scale limits that start at 0 or lie around it; which scale each has.

    Limits that it has stay; where 0 is not in their middle it gets no scale whose middle says that.
    """
    return [_scale(trace, blocks) for trace in figure["data"]]


def _scale(trace: dict[str, Any], blocks: Mapping[str, Array]) -> str | None:
    if trace.get("type") not in GRIDS or "colorscale" in trace or "coloraxis" in trace:
        return None
    z = numbers(put_together(trace.get("z", []), blocks))
    lowest = float(np.nanmin(z, initial=np.inf, where=np.isfinite(z)))
    signed = trace.get("zmid") == 0 or lowest < 0
    if {"zmin", "zmax"} & set(trace):
        signed = signed and trace.get("zmin", np.nan) == -trace.get("zmax", np.nan)
    else:
        low, high = scales.limits(np.where(np.isfinite(z), z, np.nan), signed=signed)
        trace.update(zmin=low, zmax=high)
    trace.pop("zmid", None)
    return "diverging" if signed else "sequential"


def numbers(values: Any) -> Array:
    """Numbers as float64; what is missing, or is no number, is NaN."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "uif":
        return values.astype(np.float64)
    if isinstance(values, (list, tuple)) and any(isinstance(item, (list, np.ndarray)) for item in values):
        return np.stack([numbers(item) for item in values])
    found = [math.nan if v is None or isinstance(v, str) else float(v) for v in values]
    return np.asarray(found, dtype=np.float64)


def axis(layout: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The layout of an axis by its short name: "y2" is layout["yaxis2"]."""
    found: Mapping[str, Any] = layout.get(f"{name[0]}axis{name[1:]}", {})
    return found


def title_of(part: Mapping[str, Any]) -> str:
    """The plain text of a title of an axis or colour bar; "" without one."""
    title = part.get("title", "")
    return plain_text(title.get("text", "") if isinstance(title, Mapping) else title)


def positions(trace: Mapping[str, Any], which: str, n: int) -> list[Any]:
    """x or y of the points: as given, or counted from x0 by dx."""
    given = trace.get(which)
    if given is not None:
        return list(given)
    start, step = trace.get(f"{which}0", 0), trace.get(f"d{which}", 1)
    return [start + step * i for i in range(n)]


def errors_of(trace: Mapping[str, Any], which: str, n: int) -> tuple[Array, Array] | None:
    """Lengths of the error bars below and above each point; None without any."""
    bars = trace.get(f"error_{which}", {})
    if not bars or bars.get("visible") is False:
        return None
    kind = bars.get("type", "data")
    if kind == "constant":
        above = np.full(n, float(bars.get("value", 0)))
        return np.full(n, float(bars.get("valueminus", bars.get("value", 0)))), above
    if kind != "data" or bars.get("array") is None:
        return None
    above = numbers(bars["array"])
    symmetric = bars.get("symmetric", "arrayminus" not in bars)
    return (above if symmetric else numbers(bars["arrayminus"])), above


def table_of(data: list[dict[str, Any]], layout: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Columns of all points of the traces, and whether rows were left out."""
    rows: list[tuple[Any, ...]] = []
    cut = False
    for row in _rows(data):
        if len(rows) == TABLE_ROWS:
            cut = True
            break
        rows.append(row)
    if not rows:
        return {}, False
    names = _names(data, layout)
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    kept = {name: _column(values) for name, values in columns.items()}
    used = {n: c for n, c in kept.items() if not _empty(c)}
    if len(data) == 1:
        used.pop(names[0], None)
    return used, cut


def _rows(data: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """(series, x, y, below, above, value) of every point."""
    for number, trace in enumerate(data):
        if trace.get("hoverinfo") == "skip" and len(data) > 1:
            continue  # drawn around or below another trace, such as a band
        name, kind = plain_text(trace.get("name") or f"trace {number}"), trace.get("type", "scatter")
        if kind in GRIDS:
            z = numbers(trace.get("z", []))
            xs, ys = positions(trace, "x", z.shape[1]), positions(trace, "y", z.shape[0])
            if len(xs) > z.shape[1] or len(ys) > z.shape[0]:  # edges
                xs, ys = list(range(z.shape[1])), list(range(z.shape[0]))
            for r, row in enumerate(z):
                yield from ((name, xs[c], ys[r], None, None, value) for c, value in enumerate(row))
        elif kind in ("scatter", "bar"):
            n = max(len(trace.get("x", ())), len(trace.get("y", ())))
            along = "x" if trace.get("orientation") == "h" else "y"
            below, above = errors_of(trace, along, n) or (np.full(n, np.nan), np.full(n, np.nan))
            xs, ys = positions(trace, "x", n), positions(trace, "y", n)
            yield from zip([name] * n, xs, ys, below, above, [None] * n, strict=True)
        elif kind in ("histogram", "box", "violin"):
            n = max(len(trace.get("x", ())), len(trace.get("y", ())))
            xs, ys = ([None] * n if trace.get(a) is None else list(trace[a]) for a in "xy")
            yield from zip([name] * n, xs, ys, [None] * n, [None] * n, [None] * n, strict=True)


def _names(data: list[dict[str, Any]], layout: Mapping[str, Any]) -> list[str]:
    def common(which: str) -> str:
        titles = {title_of(axis(layout, trace.get(f"{which}axis", which))) for trace in data}
        return titles.pop() or which if len(titles) == 1 else which

    x, y = common("x"), common("y")
    bars = {title_of(trace.get("colorbar", {})) for trace in data if trace.get("type") in GRIDS} - {""}
    value = bars.pop() if len(bars) == 1 else "value"
    taken = ["series", x, y if y != x else f"{y} (y)", "error below", "error above", value]
    return taken if len(set(taken)) == 6 else ["series", "x", "y", "error below", "error above", "value"]


def _column(values: tuple[Any, ...]) -> Any:
    if any(isinstance(value, str) for value in values):
        return ["–" if value is None else plain_text(value) for value in values]
    return np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)


def _empty(column: Any) -> bool:
    return isinstance(column, np.ndarray) and bool(np.isnan(column).all())


def edges_of(middles: Array, n: int) -> Array:
    """Edges of n cells from their middles; edges are given back as they are."""
    if len(middles) == n + 1:
        return middles
    if n == 1:
        return np.asarray([middles[0] - 0.5, middles[0] + 0.5])
    between = (middles[1:] + middles[:-1]) / 2
    return np.concatenate([[2 * middles[0] - between[0]], between, [2 * middles[-1] - between[-1]]])


def selects(trace: Mapping[str, Any], index: int | tuple[int, ...]) -> dict[str, Any]:
    """The change of selection that a click on a point makes: meta={"select": ["layer", "heads"]} names the columns.

    Raises:
        ReportError: the columns are not there, or hold something else than positions.
    """
    meta = trace.get("meta")
    names = meta.get("select") if isinstance(meta, Mapping) else None
    if not names:
        return {}
    values = trace["customdata"]
    for at in index if isinstance(index, tuple) else (index,):
        values = values[at]
    row = list(values) if isinstance(values, (list, tuple, np.ndarray)) else [values]
    return {name: _chosen(name, value) for name, value in zip(names, row, strict=False)}


def _chosen(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_chosen("head", item) for item in value]
    if isinstance(value, str) and name == "site":
        return value
    missing = value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)) or value == -1
    if not missing and (isinstance(value, str) or value != int(value) or value < 0):
        raise ReportError(f"customdata holds {value!r} as {name}", hint="whole numbers from 0; -1 or None for none")
    if name == "heads":
        return [] if missing else [int(value)]
    return None if missing else int(value)


def check_selects(number: int, trace: Mapping[str, Any]) -> None:
    """Raise if a click on some point could not choose what the trace says."""
    meta = trace.get("meta")
    names = meta.get("select") if isinstance(meta, Mapping) else None
    if not names:
        return
    unknown = [name for name in names if name not in Selection.__dataclass_fields__]
    if unknown:
        raise ReportError(f"trace {number} selects {unknown[0]!r}", hint=", ".join(Selection.__dataclass_fields__))
    given = trace.get("customdata")
    if given is None:
        raise ReportError(f"trace {number} selects {', '.join(names)} but has no customdata")
    grid = trace.get("type") in GRIDS
    n = len(trace.get("z", ())) if grid else max(len(trace.get("x", ())), len(trace.get("y", ())))
    if len(given) != n:
        raise ReportError(f"trace {number} has {n} points and customdata for {len(given)}")
    for r, row in enumerate(given):
        for index in [(r, c) for c in range(len(row))] if grid else [r]:
            if len(selects(trace, index)) != len(names):
                raise ReportError(f"customdata of trace {number} has fewer columns than {', '.join(names)}")
