"""The still picture of an attention pattern: the chosen heads' maps, with the chosen query and key marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.tokens import visible_text
from workbench.views.attention_pattern import pyramid
from workbench.views.attention_pattern.sources import EXACT
from workbench.views.base import scales
from workbench.views.base.selection import Selection
from workbench.views.base.spec import ViewSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AT_ONCE = 6  # heads side by side
_LOWEST = 1e-4  # where the logarithmic scale begins
_LABELS = 32  # names along an edge


def draw(figure: Figure, spec: ViewSpec, chosen: Selection) -> None:
    """The maps of the chosen heads, or of the first one, coloured as the view's state says."""
    facts, state = spec.facts, spec.state
    i, heads = _heads(facts, chosen, Selection.of(spec.selection))
    site = facts["sites"][i]
    figure.set_size_inches(6.4 if len(heads) == 1 else 4.2 * min(3, len(heads)), 5.6 if len(heads) < 4 else 8.6)
    if site["mode"] == "missing":
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.text(0, 0.5, visible_text(str(site["missing"]), 300), wrap=True)
        return
    variants = facts["variants"]
    variant = variants.index(state["weights"]) if state.get("weights") in variants else 0
    cells = spec.blocks[f"cells:{variant}:{i}"]
    maps = [_weights(cells[site["heads"].index(head)], site, hide=bool(state.get("hide"))) for head in heads]
    ranged = state.get("range", "shared")
    tops = [1.0 if ranged == "one" else scales.limits(pyramid.least(weights), signed=False)[1] for weights in maps]
    if ranged == "shared":
        tops = [min(1.0, max(tops))] * len(tops)
    rows = -(-len(heads) // 3)
    panels = figure.subplots(rows, min(3, len(heads)), squeeze=False).ravel()
    for axes in panels[len(heads) :]:
        axes.set_axis_off()
    name = variants[variant]
    what = "weight" if name == "raw" else "weight × ‖v‖, per row"
    alone = f", by {name} alone" if name in ("content", "decay") else ""
    scale = state.get("scale", "sqrt")
    for axes, head, weights, top in zip(panels, heads, maps, tops, strict=False):
        image = _map(axes, site, weights, top, scale)
        axes.set(title=_name(site, head), xlabel="key", ylabel="query")
        _names(axes, facts, site)
        _mark(axes, site, chosen)
        if ranged == "own" or axes is panels[len(heads) - 1]:
            said = {"sqrt": ", square-root scale", "log": f", logarithmic from {_LOWEST:g}"}.get(scale, "")
            label = what if site["weights"] == "normalised" else f"|A| / Σ|A|{alone}"
            beside = axes if ranged == "own" or len(heads) == 1 else list(panels[: len(heads)])
            bar = figure.colorbar(image, ax=beside, label=label + said)
            weights = _ticks(top, scale)
            places = [float(_place(np.array(weight), top, scale)) for weight in weights]
            bar.set_ticks(places, labels=[f"{weight:.3g}" for weight in weights])


def _heads(facts: Mapping[str, Any], chosen: Selection, first: Selection) -> tuple[int, list[int]]:
    """Which site and heads: those chosen that are here, else those to begin with."""
    for one in (chosen, first):
        for i, site in enumerate(facts["sites"]):
            found = [h for h in one.heads if h in site["heads"] and one.has(site["layer"], h, site["name"])]
            if found:
                return i, found[:_AT_ONCE]
    i, head = facts["first"]
    return i, [head]


def _weights(cells: Any, site: Mapping[str, Any], *, hide: bool) -> Any:
    """[row, column] weights; NaN where a query does not see, and in the first key's column if that is hidden."""
    weights = np.where(cells == 0, np.nan, pyramid.dequantise(cells))
    if hide:
        weights[:, site["firstKey"] // site["block"]] = np.nan
    return weights


def _map(axes: Axes, site: Mapping[str, Any], weights: Any, top: float, scale: str) -> Any:
    axes.set_facecolor(scales.unseen_colour())
    edges = (-0.5, site["keys"] - 0.5, site["queries"] - 0.5, -0.5)
    return axes.imshow(
        _place(weights, top, scale), vmin=0, vmax=1, extent=edges, interpolation="nearest", aspect="auto"
    )


def _place(weights: Any, top: float, scale: str) -> Any:
    """Where weights stand on the colour scale, 0 to 1."""
    share = np.minimum(1.0, weights / top)
    if scale == "linear":
        return share
    if scale == "sqrt":
        return np.sqrt(share)
    low = min(_LOWEST, top / 2)
    return np.log(np.clip(weights, low, top) / low) / np.log(top / low)


def _ticks(top: float, scale: str) -> list[float]:
    """Weights to stand beside the colours, which are round where the top is."""
    if scale == "log":
        return [*(weight for weight in (_LOWEST, 0.001, 0.01, 0.1) if weight < 0.7 * top), top]
    return [
        share * top for share in ((0.0, 0.05, 0.2, 0.5, 1.0) if scale == "sqrt" else (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    ]


def _names(axes: Axes, facts: Mapping[str, Any], site: Mapping[str, Any]) -> None:
    for axis, which, n in ((axes.xaxis, "keyTokens", site["keys"]), (axes.yaxis, "queryTokens", site["queries"])):
        at = range(0, n, max(1, -(-n // _LABELS)))
        tokens = None if site[which] is None else facts["tokens"][site[which]]
        names = [str(p) if tokens is None or n > EXACT else _short(tokens[p]) for p in at]
        axis.set_ticks(list(at), names, fontsize=7, rotation=90 if axis is axes.xaxis else 0)


def _mark(axes: Axes, site: Mapping[str, Any], chosen: Selection) -> None:
    """Lines around the chosen query's row and the chosen key's column, as the view has them."""
    for at, n, span, style in (
        (chosen.query, site["queries"], axes.axhspan, "-"),
        (chosen.key, site["keys"], axes.axvspan, "--"),
    ):
        if at is not None and at < n:
            first = at // site["block"] * site["block"]
            span(
                first - 0.5,
                first + site["block"] - 0.5,
                fill=False,
                edgecolor=scales.accent(),
                linewidth=1.4,
                linestyle=style,
            )


def _name(site: Mapping[str, Any], head: int) -> str:
    return f"L{site['layer']}H{head}, {site['name']}" if site["name"] else f"Head {head}"


def _short(token: str) -> str:
    return token if len(token) <= 12 else token[:11] + "…"
