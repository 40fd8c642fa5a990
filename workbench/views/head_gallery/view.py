"""Head gallery: a small map for each head, in groups, and the chosen head's large with its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.analysis.circuits.roles import HeadRoles
from workbench.capture.capture import Capture
from workbench.counting import count
from workbench.errors import ReportError
from workbench.tokens import visible
from workbench.views.attention_pattern.pyramid import dequantise
from workbench.views.base import scales
from workbench.views.base.given import real_numbers
from workbench.views.base.selection import SharedSelection, inputs_of
from workbench.views.base.spec import Array, ViewSpec
from workbench.views.base.view import View
from workbench.views.head_gallery.of_capture import Wall, wall_of

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
        step: rows and columns of the whole map that a cell stands for. shape: of the whole map, where step is not 1.
        row_texts, column_texts: of each row and column, such as tokens.
    """

    rows: str
    columns: str
    row0: int = 0
    column0: int = 0
    value: str = "weight"
    step: int = 1
    shape: tuple[int, int] | None = None
    row_texts: Sequence[str] | None = None
    column_texts: Sequence[str] | None = None

    def facts(self) -> dict[str, Any]:
        """JSON values, for the view's module."""
        texts = {"row_texts": self.row_texts, "column_texts": self.column_texts}
        plain = {name: getattr(self, name) for name in ("rows", "columns", "row0", "column0", "value", "step")}
        shown = {name: None if given is None else [visible(text) for text in given] for name, given in texts.items()}
        return {**plain, **shown, "shape": None if self.shape is None else list(self.shape)}


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
        groups = self._groups()
        needed = sum(max(1, -(-len(self._tiles(group)) // _PICTURED)) for group in groups)
        rows = min(_ROWS, needed)
        flat = maps.shape[1] == 1
        across = max(min(_PICTURED, len(self._tiles(group))) for group in groups)
        figure.set_size_inches(max(3.0, 0.85 * across + 1), max(1.2, rows * (0.75 if flat else 1.0)))
        panels = figure.subplots(rows, across + 1, squeeze=False)
        for panel in panels.ravel():
            panel.set_axis_off()
        axes = facts["axes"]
        said = [f"{axes['value']} ↑, {axes['columns']} →" if flat else f"{axes['rows']} ↓, {axes['columns']} →"]
        if needed > rows:
            said.append(f"{rows} of {needed:,} rows of maps; the view has all")
        figure.supxlabel("\n".join(said), fontsize=8)
        top = _largest(_weights(maps)) if self.state.get("shared") else None
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
                    self._draw(panel, _weights(maps[i] if kind == "head" else means[i]), top)
                    about = facts["heads"][i]
                    if kind == "head" and self.chosen.has(about["layer"], about["head"], about["site"]):
                        panel.spines[:].set(edgecolor=scales.accent(), linewidth=2, visible=True)
                row += 1
                if row == rows:
                    break

    def _groups(self) -> Sequence[Mapping[str, Any]]:
        """Heads as they stand: as grouped, by what is said of them, or by one of their numbers."""
        facts, order = self.spec.facts, self.state.get("order")
        if order in (None, ""):
            return list(facts["groups"])
        said = [head["said"] for head in facts["heads"]]
        if order == facts["saying"]:
            some = [name for name in dict.fromkeys(said) if name]
            named = [*some, ""] if "" in said else some
            return [
                {
                    "label": name or f"no {order}",
                    "members": [i for i, own in enumerate(said) if own == name],
                    "mean": None,
                }
                for name in named
            ]
        if order not in facts["numbers"]:
            return list(facts["groups"])
        numbers = self.spec.blocks["numbers"][facts["numbers"].index(order)]
        ranked = np.argsort(-np.nan_to_num(numbers, nan=-np.inf), kind="stable")
        return [{"label": f"By {order}, highest first", "members": ranked.tolist(), "mean": None}]

    def _tiles(self, group: Mapping[str, Any]) -> list[tuple[str, int]]:
        mean = [] if group["mean"] is None else [("mean", group["mean"])]
        return [*mean, *(("head", i) for i in group["members"])]

    def _draw(self, panel: Any, values: Array, top: float | None) -> None:
        if values.shape[0] == 1:
            panel.fill_between(range(values.shape[1]), np.nan_to_num(values[0]), step="mid", linewidth=0)
            panel.set_ylim(0, top)
            return
        most = _largest(values) if top is None else top
        roots = bool(self.state.get("roots", self.spec.facts["roots"]))
        panel.imshow(values, norm=scales.norm(0, most or 1, roots=roots), aspect="equal")
        panel.set_facecolor(scales.unseen_colour())


def _weights(cells: Array) -> Array:
    """Maps as numbers; those of a capture are bytes."""
    if cells.dtype != np.uint8:
        return cells
    return np.where(cells == 0, np.float32(np.nan), dequantise(cells))


def _largest(values: Array) -> float:
    """The largest value that a scale can end at."""
    return float(values[np.isfinite(values)].max(initial=0))


def _wrapped(label: str, longest: int = 13) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(label, longest)[:4])


def head_gallery(
    maps: Any,
    heads: Sequence[tuple[int, int]] | None = None,
    *,
    axes: Axes | None = None,
    labels: Sequence[str] | None = None,
    sites: Any = None,
    said: Sequence[str] | None = None,
    saying: str | None = None,
    groups: Sequence[Group] | None = None,
    numbers: Mapping[str, Any] | None = None,
    roles: HeadRoles | None = None,
    batch: int = 0,
    roots: bool | None = None,
    title: str = "Heads",
    caption: str | None = None,
    notes: tuple[str, ...] = (),
    provenance: Mapping[str, Any] | None = None,
    selection: SharedSelection | None = None,
) -> HeadGallery:
    """A small map for each head, and the chosen one large; of a capture, every head's pattern.

    A capture's heads stand by layer, and can be ordered by each statistic, score and role. Where a map has more cells
    than a small picture shows, a cell is the largest weight of a block of tokens; no step holds a whole map.

    Args:
        maps: a capture of one forward that kept its patterns. Or [head, row, column], not negative; NaN is not known.
            Of one row, bars are drawn.
        heads: layer and number of each; of maps. labels: such as "L3H5". axes: what rows and columns are.
        sites: names of the heads' sites, where a layer has several. Of a capture: which to show, all if None.
        said: a few words about each head, such as its name. saying: what they are, such as "role"; heads can then be
            ordered by them.
        groups: heads that stand together; by layer or site if None.
        numbers: name -> [head]; shown of the chosen head, as bars up to the largest of all, and to order heads by.
            NaN is not known. Of a capture: scores as `head_atlas` takes them.
        roles, batch: of a capture: what heads do, as `workbench.head_roles` found it, and which batch entry to show.
        roots: colours go by square roots of values at first, which shows small ones; True for a capture.

    Raises:
        ReportError: there is no head, or lengths differ.
        CaptureError: a capture of several forwards (choose one of `cap.calls`), or one without patterns.

    >>> head_gallery(np.eye(3)[None], [(0, 0)], axes=Axes("query", "key")).data()["label"].tolist()
    ['L0H0']
    """
    if isinstance(maps, Capture):
        wall = wall_of(maps, sites, batch, numbers, roles)
        many = len({site.layer for site, _ in wall.heads}) < len({site.name for site, _ in wall.heads})
        over = f"{wall.shape[0]} queries and {wall.shape[1]} keys"
        cells = (
            f"a cell is the largest weight of {wall.block} x {wall.block} tokens" if wall.block > 1 else "cell by cell"
        )
        return _made(
            wall.maps,
            [(site.layer, head) for site, head in wall.heads],
            axes or _axes_of(wall),
            labels=wall.labels,
            sites=[site.name for site, _ in wall.heads] if many else None,
            said=said or wall.roles,
            saying=saying or ("role" if wall.roles else None),
            groups=groups,
            numbers=wall.numbers,
            roots=True if roots is None else roots,
            title=title,
            caption=caption
            or f"The patterns of {count(len(wall.heads), 'head')} over {over}, {cells}."
            + ("" if wall.begins is None else f" {wall.begins.why}"),
            notes=(*notes, "Weights are kept in 8 bits after a square root: the error is at most 0.004.", *wall.notes),
            provenance=maps.provenance if provenance is None else provenance,
            begins={} if wall.begins is None else wall.begins.selection,
            selection=selection,
            inputs=None if wall.tokens[0] is None else inputs_of(wall.tokens[0]),
        )
    values = real_numbers(maps, "maps").astype(np.float32)
    if heads is None or axes is None or values.ndim != 3 or values.size == 0 or len(values) != len(heads):
        raise ReportError("maps are [head, row, column], as many as heads, at least one, with axes", shape=values.shape)
    return _made(
        values, heads, axes, labels=labels, sites=sites, said=said, saying=saying, groups=groups, numbers=numbers,
        roots=bool(roots), title=title, caption=caption or f"{count(len(values), 'head')}.", notes=notes,
        provenance=provenance or {}, selection=selection,
    )  # fmt: skip


def _axes_of(wall: Wall) -> Axes:
    texts = wall.tokens if wall.block == 1 else (None, None)
    return Axes("query", "key", step=wall.block, shape=wall.shape, row_texts=texts[0], column_texts=texts[1])


def _made(
    maps: Array,
    heads: Sequence[tuple[int, int]],
    axes: Axes,
    *,
    labels: Sequence[str] | None,
    sites: Sequence[str] | None,
    said: Sequence[str] | None,
    saying: str | None,
    groups: Sequence[Group] | None,
    numbers: Mapping[str, Any] | None,
    roots: bool,
    title: str,
    caption: str,
    notes: tuple[str, ...],
    provenance: Mapping[str, Any],
    selection: SharedSelection | None,
    begins: Mapping[str, Any] | None = None,
    inputs: str | None = None,
) -> HeadGallery:
    n = len(maps)
    named = [f"L{layer}H{head}" for layer, head in heads] if labels is None else list(labels)
    for name, column in {"labels": named, "sites": sites, "said": said}.items():
        if column is not None and len(column) != n:
            raise ReportError(f"there are {n} heads and {len(column)} {name}")
    found = {visible(name): real_numbers(given, name) for name, given in (numbers or {}).items()}
    for name, array in found.items():
        if array.shape != (n,):
            raise ReportError(f"there are {n} heads, and another number of {name}", shape=array.shape)
    for name, texts, size in (("rows", axes.row_texts, maps.shape[1]), ("columns", axes.column_texts, maps.shape[2])):
        if texts is not None and len(texts) != size:
            raise ReportError(f"there are {size} {name} and {len(texts)} texts of them")
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
        caption=caption,
        facts={
            "heads": [
                {
                    "label": visible(named[i]),
                    "layer": int(heads[i][0]),
                    "head": int(heads[i][1]),
                    "site": visible(sites[i]) if sites is not None else None,
                    "said": visible(said[i]) if said is not None and said[i] else "",
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
            "axes": axes.facts(),
            "numbers": list(found),
            "saying": saying,
            "roots": roots,
        },
        blocks={
            "maps": maps[:kept].copy(),
            "means": np.stack(means) if means else np.zeros((0, *maps.shape[1:]), np.float32),
            "numbers": np.stack([c[:kept] for c in found.values()]) if found else np.zeros((0, kept)),
        },
        table={
            **({"site": [visible(site) for site in sites]} if sites is not None else {}),
            "label": [visible(label) for label in named],
            **({"about": [visible(words) if words else "" for words in said]} if said is not None else {}),
            **found,
        },
        notes=notes,
        selection=begins or {},
        provenance=provenance,
        inputs=inputs,
    )
    return HeadGallery(spec, selection)
