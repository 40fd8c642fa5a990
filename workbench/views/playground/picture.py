"""The still picture of a playground: what is said next before and after, the heads, and the chosen head's pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.views.attention_pattern import pyramid
from workbench.views.base import scales
from workbench.views.base.drawing import SERIES
from workbench.views.base.selection import Selection
from workbench.views.base.spec import ViewSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = 14  # tokens in the picture
_NAMES = 40  # tokens along an edge of the map


def draw(figure: Figure, spec: ViewSpec, chosen: Selection) -> None:
    """Bars of the place that is looked at, the map of the heads, the pattern; as the view's state says."""
    bars, heads, pattern = figure.subplots(1, 3, width_ratios=[1.1, 0.9, 1.2])
    _bars(bars, spec)
    _heads(figure, heads, spec, chosen)
    _pattern(pattern, spec, chosen)


def _bars(panel: Any, spec: ViewSpec) -> None:
    facts = spec.facts
    at = min(int(spec.state.get("place", 0)), len(facts["places"]) - 1)
    place = facts["places"][at]
    numbers = spec.blocks["next"][at, : len(place["ids"])][:_ROWS]
    edits = facts["edits"]
    masked = f" at position {place['position']}" if len(facts["places"]) > 1 else ""
    panel.set(title=f"Next token{masked}", xlabel="probability")
    wrong = next((said for said in place["wrong"] if said), None)
    if wrong:
        panel.text(0, 1.02 if len(numbers) else 0.5, wrong, transform=panel.transAxes, fontsize=7, wrap=True)
    rows = np.arange(len(numbers))
    sides = [("before", -0.2, SERIES[0]), ("after", 0.2, SERIES[1])] if edits else [("", 0.0, SERIES[0])]
    for i, (label, shift, colour) in enumerate(sides):
        widths = np.nan_to_num(numbers[:, i])
        panel.barh(rows + shift, widths, height=0.38 if edits else 0.7, color=colour, label=label or None)
    panel.set_yticks(rows, [_short(token) for token in place["tokens"][:_ROWS]], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(left=0)
    if edits:
        panel.legend(fontsize=8)
        said = "; ".join(_words(edit) for edit in edits[:3]) + (f" and {len(edits) - 3} more" if len(edits) > 3 else "")
        panel.set_title(f"Next token{masked}, without {said}", fontsize=8)


def _words(edit: Any) -> str:
    if edit["query"] is None:
        return str(edit["label"])
    where = f"row {edit['query']}" if edit["key"] is None else f"edge {edit['query']} → {edit['key']}"
    return f"{edit['label']} {where}"


def _heads(figure: Figure, panel: Any, spec: ViewSpec, chosen: Selection) -> None:
    facts, state = spec.facts, spec.state
    labels = [each["label"] for each in facts["metrics"]]
    group = next((g for g in facts["groups"] if _in(g, facts["kept"])), facts["groups"][0])
    grid = np.full((len(group["sites"]), max(site["heads"] for site in group["sites"])), np.nan)
    at = labels.index(state["metric"]) if state.get("metric") in labels else 0
    after = int(bool(state.get("after")) and bool(facts["edits"]))
    about: dict[str, Any] = facts["metrics"][at] if labels else {"label": "no statistic", "signed": False}
    shown = spec.blocks["values"][after, at] if labels else np.full(10_000, np.nan)
    for row, site in enumerate(group["sites"]):
        grid[row, : site["heads"]] = shown[site["start"] : site["start"] + site["heads"]]
        for head in range(site["heads"]):
            if chosen.has(site["layer"], head, site["name"]):
                panel.add_patch(scales.frame_of(head - 0.5, row - 0.5))
    low, high = scales.limits(shown, signed=about["signed"])
    scale = scales.diverging() if about["signed"] else scales.sequential()
    image = panel.imshow(grid, cmap=scale, vmin=low, vmax=high, aspect="auto")
    panel.set_facecolor(scales.unseen_colour())
    panel.set(title=group["label"], xlabel="head", ylabel="layer")
    panel.xaxis.get_major_locator().set_params(integer=True)
    every = max(1, len(group["sites"]) // 16)
    panel.set_yticks(
        range(0, len(group["sites"]), every), [str(site["layer"]) for site in group["sites"]][::every]
    )  # fmt: skip
    sites = [site["name"] for each in facts["groups"] for site in each["sites"]]
    for edit in facts["edits"]:
        names = [site["name"] for site in group["sites"]]
        if sites[edit["site"]] in names:
            mark = "x" if edit["query"] is None else "."
            panel.plot(edit["head"], names.index(sites[edit["site"]]), mark, color=scales.accent(), markersize=8)
    figure.colorbar(image, ax=panel, label=about["label"])


def _in(group: Any, head: int) -> bool:
    return any(site["start"] <= head < site["start"] + site["heads"] for site in group["sites"])


def _pattern(panel: Any, spec: ViewSpec, chosen: Selection) -> None:
    facts = spec.facts
    sites = [site for group in facts["groups"] for site in group["sites"]]
    i = next(i for i, site in enumerate(sites) if site["start"] <= facts["kept"] < site["start"] + site["heads"])
    head, about = facts["kept"] - sites[i]["start"], facts["maps"][i]
    name = f"L{sites[i]['layer']}H{head}"
    after = int(bool(spec.state.get("after")) and bool(facts["edits"]))
    cells = spec.blocks.get(f"cells:{after}")
    panel.set(title=name, xlabel="key", ylabel="query")
    if cells is None:
        panel.set_axis_off()
        panel.text(0, 0.5, f"No pattern of {name} is known.", wrap=True)
        return
    weights = np.where(cells == 0, np.nan, pyramid.dequantise(cells))
    top = scales.limits(pyramid.least(weights), signed=False)[1]
    panel.imshow(np.sqrt(weights / top), vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    panel.set_facecolor(scales.unseen_colour())
    for axis, which, n in ((panel.xaxis, "keyTokens", about["keys"]), (panel.yaxis, "queryTokens", about["queries"])):
        at = range(0, n, max(1, -(-n // _NAMES)))
        tokens = None if about[which] is None else facts["tokens"][about[which]]
        names = [str(p) if tokens is None else _short(tokens[p]) for p in at]
        axis.set_ticks(list(at), names, fontsize=7, rotation=90 if axis is panel.xaxis else 0)
    for edit in facts["edits"]:
        if (edit["site"], edit["head"]) != (i, head) or edit["query"] is None:
            continue
        if edit["key"] is None:
            panel.axhline(edit["query"], color=scales.accent(), linewidth=1.4)
        else:
            panel.plot(edit["key"], edit["query"], "x", color=scales.accent(), markersize=7)
    chosen_in = (chosen.query, about["queries"], panel.axhspan), (chosen.key, about["keys"], panel.axvspan)
    for place, n, span in chosen_in:
        if place is not None and place < n:
            span(place - 0.5, place + 0.5, fill=False, edgecolor=scales.accent(), linewidth=1.2)


def _short(token: str) -> str:
    return token if len(token) <= 14 else token[:13] + "…"
