"""Head atlas: layers down, heads across, coloured by a number per head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.capture.capture import Capture
from workbench.counting import count
from workbench.errors import ReportError, nearest
from workbench.hooks.sites import Kind, Site
from workbench.tokens import visible
from workbench.views.base import scales
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View
from workbench.views.head_atlas.leading import leading
from workbench.views.head_atlas.numbers import Scores, of_capture, of_scores
from workbench.views.head_atlas.quantities import Quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class HeadAtlas(View):
    """See `head_atlas`."""

    def picture(self, figure: Figure) -> None:
        facts, values = self.spec.facts, self.spec.blocks["values"]
        groups = facts["groups"]
        rows = [len(group["sites"]) for group in groups]
        figure.set_size_inches(6.5, sum(max(1.0, 0.24 * n) + 0.75 for n in rows))
        panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[max(4, n) for n in rows])[:, 0]
        labels = [each["label"] for each in facts["metrics"]]
        at = labels.index(self.state["metric"]) if self.state.get("metric") in labels else facts["first"]
        shown = values[at] if len(values) else np.full(_count(groups), np.nan)
        about = facts["metrics"][at] if len(values) else asdict(Quantity("no statistic"))
        if self.state.get("certain") and about["interval"]:
            ends = self.spec.blocks["low"][at], self.spec.blocks["high"][at]
            shown = np.where((ends[0] <= 0) & (ends[1] >= 0), np.nan, shown)
        low, high = scales.limits(shown, signed=about["signed"])
        for panel, group in zip(panels, groups, strict=True):
            grid = np.full((len(group["sites"]), max(site["heads"] for site in group["sites"])), np.nan)
            for row, site in enumerate(group["sites"]):
                grid[row, : site["heads"]] = shown[site["start"] : site["start"] + site["heads"]]
            scale = scales.diverging() if about["signed"] else scales.sequential()
            image = panel.imshow(grid, cmap=scale, vmin=low, vmax=high, aspect="auto")
            panel.set_facecolor(scales.unseen_colour())
            panel.set(title=group["label"], xlabel="head")
            for row, site in enumerate(group["sites"]):
                for head in range(site["heads"]):
                    if self.chosen.has(site["layer"], head, site["name"]):
                        panel.add_patch(scales.frame_of(head - 0.5, row - 0.5))
            every = max(1, len(group["sites"]) // 16)
            panel.set_yticks(range(0, len(group["sites"]), every), [f"L{s['layer']}" for s in group["sites"]][::every])
            panel.xaxis.get_major_locator().set_params(integer=True)
        unit = f" ({about['unit']})" if about["unit"] else ""
        figure.colorbar(image, ax=list(panels), label=about["label"] + unit)


def head_atlas(
    source: Capture | Mapping[str, Scores] | pd.DataFrame,
    *,
    metric: str | None = None,
    title: str = "Heads",
    caption: str | None = None,
    unit: str = "",
    signed: bool | None = None,
    meanings: Mapping[str, str] | None = None,
    kind: Kind = "self",
    provenance: Mapping[str, Any] | None = None,
    selection: SharedSelection | None = None,
) -> HeadAtlas:
    """All heads at once, coloured by a number each.

    Args:
        source: a capture: each statistic with a value per query makes a metric, averaged over queries, batch entries
            and forwards, with 95 % t intervals over entries where there are at least five. Or
            {label: scores}, where scores are {(layer, head): value}, an array [layer, head], or a frame with columns
            layer, head, value and, if known, low, high and site.
        metric: the statistic or label to begin with.
        unit, signed: of given scores; signed ones are coloured around 0, and are found out if None.
        meanings: by label, half a sentence on what given scores are.
        kind: of attention whose scores are given.

    Raises:
        ReportError: there is no head, or no such metric.

    >>> head_atlas({"importance": {(0, 0): 0.5, (0, 1): -0.1}}).data()["importance"].tolist()
    [0.5, -0.1]
    """
    begins = leading(source) if isinstance(source, Capture) else None
    if isinstance(source, Capture):
        sites, metrics, values, low, high, over = of_capture(source)
        provenance = dict(source.provenance) if provenance is None else provenance
    else:
        sites, metrics, values, low, high = of_scores(source, unit, signed, kind, meanings)
        over = "Given scores"
    names = list(metrics)
    if metric is not None and metric not in names and metric not in [m.label for m in metrics.values()]:
        raise ReportError(f'the atlas has no metric "{metric}"', hint=nearest(metric, names))
    first = 0
    if metric is not None:
        first = names.index(metric) if metric in names else [m.label for m in metrics.values()].index(metric)
    groups, order = _grouped(sites)
    several = values[:, order], low[:, order], high[:, order]
    spec = ViewSpec(
        kind="head_atlas",
        title=title,
        caption=caption
        or f"{over}: {count(len(order), 'head')} at {count(len(sites), 'site')}."
        + ("" if begins is None else f" {begins.why}"),
        facts={
            "groups": groups,
            "metrics": [
                {**asdict(m), "interval": bool(np.isfinite(low[i]).any())} for i, m in enumerate(metrics.values())
            ],
            "first": first,
        },
        blocks={
            name: np.asarray(block, np.float32) for name, block in zip(("values", "low", "high"), several, strict=True)
        },
        table=_table(groups, names, *several),
        notes=_notes(names, *several),
        selection={} if begins is None else begins.selection,
        provenance=provenance or {},
    )
    return HeadAtlas(spec, selection)


def _grouped(sites: Sequence[Site]) -> tuple[list[dict[str, Any]], list[int]]:
    """Groups of sites that make one map each, and the order of heads in which they stand."""
    starts = np.cumsum([0, *(site.n_heads or 0 for site in sites)])
    groups: dict[str, list[dict[str, Any]]] = {}
    order: list[int] = []
    labels = [group_label(site) for site in sites]
    at = 0
    for label in dict.fromkeys(labels):
        for i, site in enumerate(sites):
            if labels[i] != label:
                continue
            heads = int(site.n_heads or 0)
            name = visible(site.name) if site.name else None
            groups.setdefault(label, []).append({"name": name, "layer": int(site.layer), "heads": heads, "start": at})
            order.extend(range(starts[i], starts[i] + heads))
            at += heads
    return [{"label": label, "sites": members} for label, members in groups.items()], order


def group_label(site: Site) -> str:
    """What kind of attention a site is, in words: "Encoder self-attention"."""
    kind = f"{site.kind}-attention" if site.kind in ("self", "cross") else f"{site.kind} attention"
    kind = "gates" if site.kind == "gate" else kind
    words = kind if site.kind == "cross" or not site.tower else f"{site.tower} {kind}"
    return visible(words[:1].upper() + words[1:])


def _count(groups: list[dict[str, Any]]) -> int:
    return sum(site["heads"] for group in groups for site in group["sites"])


def _table(groups: list[dict[str, Any]], names: list[str], values: Any, low: Any, high: Any) -> dict[str, Any]:
    heads = [(site, head) for group in groups for site in group["sites"] for head in range(site["heads"])]
    table: dict[str, Any] = {}
    if any(site["name"] for site, _ in heads):
        table["site"] = [site["name"] or "" for site, _ in heads]
    table["layer"] = np.array([site["layer"] for site, _ in heads], np.int32)
    table["head"] = np.array([head for _, head in heads], np.int32)
    for i, name in enumerate(names):
        table[name] = np.asarray(values[i], np.float64)
        if np.isfinite(low[i]).any():
            table[f"{name} low"], table[f"{name} high"] = np.asarray(low[i]), np.asarray(high[i])
    return table


def _notes(names: list[str], values: Any, low: Any, high: Any) -> tuple[str, ...]:
    kinds = (("Not known for every head", np.isnan), ("Infinite for some heads", np.isinf))
    found = [(what, [name for i, name in enumerate(names) if odd(values[i]).any()]) for what, odd in kinds]
    notes = [f"{what}, and grey there: {', '.join(some)}." for what, some in found if some]
    bare = np.isfinite(values) & ~(np.isfinite(low) & np.isfinite(high))
    some = [f"{count(int(bare[i].sum()), 'head')} by {name}" for i, name in enumerate(names)
            if np.isfinite(low[i]).any() and bare[i].any()]  # fmt: skip
    if some:
        notes.append(f"No interval of {', '.join(some)}: few examples carry the mean, or only one is known; take more.")
    return tuple(notes)
