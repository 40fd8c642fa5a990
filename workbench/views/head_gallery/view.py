"""Head gallery: a small map for each head, in groups, and the chosen head's large with its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import ReportError
from workbench.tokens import visible
from workbench.views.base import scales
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import Array, ViewSpec
from workbench.views.base.view import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 1200
"""Heads that a gallery shows."""
_PICTURED, _ROWS = 12, 16  # columns and rows of the still picture


@dataclass(frozen=True)
class Axes:
    """What the rows and columns of a map are.

    Attributes:
        rows, columns: names, for the large map. row0, column0: numbers of the first.
        value: what a cell holds, for sentences and the legend.
    """

    rows: str
    columns: str
    row0: int = 0
    column0: int = 0
    value: str = "weight"


@dataclass(frozen=True)
class Group:
    """Heads that stand together.

    Attributes:
        label: of the group. members: rows of the heads. map: drawn before its heads; None for none.
    """

    label: str
    members: Sequence[int]
    map: Any = None


class HeadGallery(View):
    """See `head_gallery`."""

    def picture(self, figure: Figure) -> None:
        facts, maps, means = self.spec.facts, self.spec.blocks["maps"], self.spec.blocks["means"]
        groups = facts["groups"]
        needed = sum(max(1, -(-len(self._tiles(group)) // _PICTURED)) for group in groups)
        rows = min(_ROWS, needed)
        flat = maps.shape[1] == 1
        across = max(min(_PICTURED, len(self._tiles(group))) for group in groups)
        figure.set_size_inches(max(3.0, 0.85 * across + 1), max(1.2, rows * (0.75 if flat else 1.0)))
        panels = figure.subplots(rows, across + 1, squeeze=False)
        for panel in panels.ravel():
            panel.set_axis_off()
        if needed > rows:
            figure.supxlabel(f"{rows} of {needed:,} rows; the view has all", fontsize=8)
        top = float(np.nanmax(maps, initial=0)) if self.state.get("shared") else None
        row = 0
        for group in groups:
            if row == rows:
                break
            panels[row, 0].text(0, 0.5, _wrapped(group["label"]), ha="left", va="center", fontsize=8)
            tiles = self._tiles(group)
            for start in range(0, max(1, len(tiles)), _PICTURED):
                for column, (kind, i) in enumerate(tiles[start : start + _PICTURED], 1):
                    panel = panels[row, column]
                    panel.set_axis_on()
                    panel.set(xticks=[], yticks=[])
                    panel.set_title(facts["heads"][i]["label"] if kind == "head" else "mean", fontsize=7, pad=2)
                    self._draw(panel, maps[i] if kind == "head" else means[i], top)
                    about = facts["heads"][i]
                    if kind == "head" and self.chosen.has(about["layer"], about["head"], about["site"]):
                        panel.spines[:].set(edgecolor=scales.accent(), linewidth=2, visible=True)
                row += 1
                if row == rows:
                    break

    def _tiles(self, group: Mapping[str, Any]) -> list[tuple[str, int]]:
        mean = [] if group["mean"] is None else [("mean", group["mean"])]
        return [*mean, *(("head", i) for i in group["members"])]

    def _draw(self, panel: Any, values: Array, top: float | None) -> None:
        if values.shape[0] == 1:
            panel.fill_between(range(values.shape[1]), np.nan_to_num(values[0]), step="mid", linewidth=0)
            panel.set_ylim(0, top)
            return
        most = float(np.nanmax(values, initial=0)) if top is None else top
        panel.imshow(values, vmin=0, vmax=most or 1, aspect="equal")
        panel.set_facecolor(scales.unseen_colour())


def _wrapped(label: str, longest: int = 13) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(label, longest)[:4])


def head_gallery(
    maps: Any,
    heads: Sequence[tuple[int, int]],
    *,
    axes: Axes,
    labels: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    said: Sequence[str] | None = None,
    groups: Sequence[Group] | None = None,
    numbers: Mapping[str, Any] | None = None,
    title: str = "Heads",
    caption: str | None = None,
    notes: tuple[str, ...] = (),
    provenance: Mapping[str, Any] | None = None,
    selection: SharedSelection | None = None,
) -> HeadGallery:
    """A small map for each head, and the chosen one large.

    Args:
        maps: [head, row, column], not negative; NaN is not known. Of one row, bars are drawn.
        heads: layer and number of each. labels: such as "L3H5". sites: names of their sites, where a layer has several.
        axes: what rows and columns are.
        said: a few words about each head, such as its name.
        groups: heads that stand together; by layer or site if None.
        numbers: name -> [head]; shown of the chosen head, as bars up to the largest of all heads. NaN is not known.

    Raises:
        ReportError: there is no head, or lengths differ.

    >>> head_gallery(np.eye(3)[None], [(0, 0)], axes=Axes("query", "key")).data()["label"].tolist()
    ['L0H0']
    """
    values = np.asarray(maps, dtype=np.float32)
    if values.ndim != 3 or values.size == 0 or len(values) != len(heads):
        raise ReportError("maps are [head, row, column], as many as heads, at least one", shape=values.shape)
    n = len(values)
    named = [f"L{layer}H{head}" for layer, head in heads] if labels is None else list(labels)
    for name, column in {"labels": named, "sites": sites, "said": said}.items():
        if column is not None and len(column) != n:
            raise ReportError(f"there are {n} heads and {len(column)} {name}")
    found = {visible(name): np.asarray(given, dtype=np.float64) for name, given in (numbers or {}).items()}
    for name, array in found.items():
        if array.shape != (n,):
            raise ReportError(f"there are {n} heads, and another number of {name}", shape=array.shape)
    if groups is None:
        owners = [f"Layer {layer}" for layer, _ in heads] if sites is None else list(sites)
        groups = [Group(name, [i for i, own in enumerate(owners) if own == name]) for name in dict.fromkeys(owners)]
    kept = min(n, MOST)
    if kept < n:
        notes = (*notes, f"Shown are the first {MOST:,} of {n:,} heads; the table holds all.")
    means = [np.asarray(group.map, dtype=np.float32) for group in groups if group.map is not None]
    numbered = iter(range(len(means)))
    spec = ViewSpec(
        kind="head_gallery",
        title=title,
        caption=caption or f"{n:,} heads.",
        facts={
            "heads": [
                {
                    "label": visible(named[i]),
                    "layer": int(heads[i][0]),
                    "head": int(heads[i][1]),
                    "site": visible(sites[i]) if sites is not None else None,
                    "said": visible(said[i]) if said is not None else "",
                }
                for i in range(kept)
            ],
            "groups": [
                {
                    "label": visible(group.label),
                    "members": [int(i) for i in group.members if i < kept],
                    "mean": None if group.map is None else next(numbered),
                }
                for group in groups
            ],
            "axes": {
                "rows": axes.rows, "columns": axes.columns, "row0": axes.row0, "column0": axes.column0,
                "value": axes.value,
            },
            "numbers": list(found),
        },
        blocks={
            "maps": values[:kept].copy(),
            "means": np.stack(means) if means else np.zeros((0, *values.shape[1:]), np.float32),
            "numbers": np.stack([c[:kept] for c in found.values()]) if found else np.zeros((0, kept)),
        },
        table={
            **({"site": [visible(site) for site in sites]} if sites is not None else {}),
            "label": [visible(label) for label in named],
            **({"about": [visible(words) for words in said]} if said is not None else {}),
            **found,
        },
        notes=notes,
        provenance=provenance or {},
    )  # fmt: skip
    return HeadGallery(spec, selection)
