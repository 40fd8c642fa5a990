"""Compare: patterns of two sets of heads, two atlases or two matrices of one shape, and the first minus the second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import ReportError
from workbench.tokens import visible
from workbench.views.attention_pattern import AttentionPattern, pyramid
from workbench.views.base import scales
from workbench.views.base.given import real_numbers
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View
from workbench.views.head_atlas import HeadAtlas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 2048
MOST_CELLS = 2_000_000
"""Cells of all pairs of maps together, beyond which the last pairs are left out."""
_ROWS_OF_TABLE = 1000


@dataclass(frozen=True)
class _Matrix:
    """Values [map, row, column] with their names; NaN where there is nothing.

    `of` says which head each map is of, and is empty for what is of no head.
    """

    values: np.ndarray[Any, Any]
    size: tuple[int, int]
    block: int = 1
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    titles: tuple[str, str] = ("row", "column")
    unit: str = ""
    selects: str = "none"
    error: float = 0.0
    inputs: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    of: Sequence[Mapping[str, Any]] = ()

    def first(self, n: int) -> _Matrix:
        """The first n maps."""
        return replace(self, values=self.values[:n], of=self.of[:n])


class Compare(View):
    """See `compare`."""

    size = (10.5, 3.6)

    def picture(self, figure: Figure) -> None:
        facts, pair = self.spec.facts, self._pair()
        a, b = (self.spec.blocks[name][pair] for name in "ab")
        labels = [
            f"{label} {head['label']}" if head and len(facts["pairs"]) > 1 else label
            for label, head in zip(facts["labels"], facts["pairs"][pair]["of"], strict=True)
        ]
        low, high = scales.limits(np.concatenate([a.ravel(), b.ravel()]), signed=facts["signed"])
        ends = scales.limits(a - b, signed=True)
        panels = figure.subplots(1, 3, sharex=True, sharey=True)
        sequential = scales.diverging() if facts["signed"] else scales.sequential()
        shown = [(a, labels[0], sequential, (low, high)), (b, labels[1], sequential, (low, high))]
        shown.append((a - b, f"{labels[0]} − {labels[1]}", scales.diverging(), ends))
        edges = (-0.5, facts["size"][1] - 0.5, facts["size"][0] - 0.5, -0.5)
        for axes, (values, title, scale, (bottom, top)) in zip(panels, shown, strict=True):
            axes.set_facecolor(scales.unseen_colour())
            # The view's own scale: square roots of sizes, unless linear was chosen.
            roots = self.state.get("scale", "sqrt") == "sqrt"
            norm = scales.norm(bottom, top, roots=roots)
            image = axes.imshow(values, cmap=scale, norm=norm, extent=edges, aspect="auto")
            axes.set(title=title, xlabel=facts["columnTitle"])
            unit = ", ".join(part for part in (facts["unit"], "square-root scale" if roots else "") if part)
            figure.colorbar(image, ax=axes, label=unit, ticks=scales.ticks(bottom, top))
            self._mark(axes)
        panels[0].set_ylabel(facts["rowTitle"])

    def _pair(self) -> int:
        """Which pair is shown: that of the chosen head, or the one that was picked."""
        chosen = next((i for i, pair in enumerate(self.spec.facts["pairs"]) if self._has_chosen(pair)), None)
        return chosen if chosen is not None else self._picked() or 0

    def _picked(self) -> int | None:
        """The pair that was picked last."""
        picked = self.state.get("pair")
        return next((i for i in range(len(self.spec.facts["pairs"])) if str(i) == picked), None)

    def _has_chosen(self, pair: Mapping[str, Any]) -> bool:
        return any(head and self.chosen.has(head["layer"], head["head"], head["site"]) for head in pair["of"])

    def _put_state(self, state: Mapping[str, Any]) -> None:
        """Of a pair that is picked one head becomes the chosen one, where they are heads of a model."""
        before = self.state.get("pair")
        super()._put_state(state)
        picked = self._picked()
        if picked is None or self.state["pair"] == before:
            return
        pair = self.spec.facts["pairs"][picked]
        head = next((head for head in pair["of"] if head and head["layer"] is not None), None)
        if head is not None and not self._has_chosen(pair):
            self.select(layer=head["layer"], heads=(head["head"],), site=head["site"])

    def _mark(self, axes: Any) -> None:
        """A frame around the chosen cell."""
        facts, chosen = self.spec.facts, self.chosen
        places = {"pattern": (chosen.query, chosen.key), "head": (chosen.layer, next(iter(chosen.heads), None))}
        row, column = places.get(facts["selects"], (None, None))
        if row is not None and column is not None and row < facts["size"][0] and column < facts["size"][1]:
            block = facts["block"]
            at = (column // block * block - 0.5, row // block * block - 0.5)
            axes.add_patch(scales.frame_of(*at, block, block))


def compare(
    a: Any,
    b: Any,
    *,
    labels: Sequence[str] = ("A", "B"),
    title: str = "Comparison",
    caption: str | None = None,
    selection: SharedSelection | None = None,
) -> Compare:
    """Two things of one shape beside each other, and the first minus the second around zero.

    Patterns may be of two mechanisms, such as a layer of attention and the recurrence that took its place: the heads of
    one stand beside those of the other, pair by pair, with the cosine of their maps, and one selection for both.

    Args:
        a, b: two attention patterns (the heads of their leading sites, pair by pair; the leading heads alone where they
            are not as many), two head atlases (their first metrics), or two matrices.
        labels: what to call them.

    Raises:
        ReportError: they are of different kinds or shapes, speak of other tokens, or are too large to compare cell by
            cell.

    >>> compare(np.eye(3), np.zeros((3, 3))).data()["difference"].tolist()[:2]
    [1.0, 1.0]
    """
    first, second = _matrix(a), _matrix(b)
    several = len(first.values), len(second.values)
    n = several[0] if several[0] == several[1] else 1
    first, second = first.first(n), second.first(n)
    if first.values.shape != second.values.shape or first.size != second.size:
        raise ReportError(
            f"the two have shapes {list(first.size)} and {list(second.size)}",
            hint="compare what has the same rows and columns",
        )
    for axis in ("rows", "columns"):
        ours, theirs = getattr(first, axis), getattr(second, axis)
        odd = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if odd is not None:
            raise ReportError(f"the {axis} differ: {ours[odd]!r} and {theirs[odd]!r} at {odd}", hint="compare one text")
    if len(labels) != 2:
        raise ReportError(f"two labels are needed, not {len(labels)}")
    kept = max(1, min(n, MOST_CELLS // first.values[0].size))
    values = np.stack([first.values[:kept], second.values[:kept]]).astype(np.float32)
    signed = bool(np.nanmin(values, initial=0) < 0)
    shown = [visible(label) for label in labels]
    spec = ViewSpec(
        kind="compare",
        title=title,
        caption=caption
        or f"{shown[0]}, {shown[1]}, and {shown[0]} minus {shown[1]}: {first.size[0]:,} × {first.size[1]:,}"
        f"{f', {kept:,} pairs of heads' if kept > 1 else ''}.",
        facts={
            "labels": shown,
            "rows": list(first.rows),
            "columns": list(first.columns),
            "rowTitle": first.titles[0],
            "columnTitle": first.titles[1],
            "unit": first.unit,
            "signed": signed,
            "selects": first.selects,
            "block": first.block,
            "size": list(first.size),
            "pairs": _pairs(first, second, kept),
        },
        blocks={"a": values[0], "b": values[1]},
        table=_table(first, second, values),
        notes=(*_notes(first, second), *_left_out(several, n, kept)),
        provenance={"a": dict(first.provenance), "b": dict(second.provenance)},
        inputs=first.inputs if first.inputs == second.inputs else None,
    )
    return Compare(spec, selection)


def _matrix(thing: Any) -> _Matrix:
    if isinstance(thing, AttentionPattern):
        return _of_pattern(thing)
    if isinstance(thing, HeadAtlas):
        return _of_atlas(thing)
    if isinstance(thing, View):
        raise ReportError(f"a {type(thing).__name__} cannot be compared", hint="patterns, atlases and matrices can")
    values = real_numbers(thing, "what is compared")
    if values.ndim != 2 or 0 in values.shape:
        raise ReportError("a matrix is [row, column]", shape=values.shape)
    if max(values.shape) > LONGEST:
        raise ReportError(f"the longest side may have {LONGEST:,} cells", shape=values.shape)
    return _Matrix(values[None], (values.shape[0], values.shape[1]))


def _of_pattern(view: AttentionPattern) -> _Matrix:
    facts, blocks = view.spec.facts, view.spec.blocks
    i = facts["first"][0]
    site = facts["sites"][i]
    exact = blocks.get(f"exact:0:{i}")
    cells = blocks[f"cells:0:{i}"]
    values = exact if exact is not None else np.where(cells == 0, np.nan, pyramid.dequantise(cells))
    if max(values.shape) > LONGEST:
        raise ReportError(
            f"the longest side may have {LONGEST:,} cells", shape=values.shape, hint="pass a smaller budget="
        )
    names = [[] if site[which] is None else facts["tokens"][site[which]] for which in ("queryTokens", "keyTokens")]
    error = 0.0 if exact is not None else site["error"]
    size = site["queries"], site["keys"]
    return _Matrix(
        values, size, site["block"], names[0], names[1], ("query", "key"), "weight", "pattern", error,
        view.spec.inputs, view.spec.provenance, [_head(site, head) for head in site["heads"]],
    )  # fmt: skip


def _head(site: Mapping[str, Any], head: int) -> dict[str, Any]:
    named = site["name"] is not None
    label = f"L{site['layer']}H{head}" if named else f"H{head}"
    return {"label": label, "layer": site["layer"] if named else None, "head": head, "site": site["name"]}


def _pairs(first: _Matrix, second: _Matrix, n: int) -> list[dict[str, Any]]:
    """For each pair of maps what they are of, and the cosine of the two; None where one of them is all zeros."""
    found = []
    for i in range(n):
        a, b = (np.nan_to_num(m.values[i].astype(np.float64)) for m in (first, second))
        lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
        of = [m.of[i] if m.of else None for m in (first, second)]
        found.append({"of": of, "cosine": float((a * b).sum()) / lengths if lengths > 0 else None})
    return found


def _left_out(several: tuple[int, int], n: int, kept: int) -> list[str]:
    notes = []
    if several[0] != several[1]:
        notes.append(f"{several[0]} and {several[1]} heads make no pairs: the first of each are compared.")
    if kept < n:
        notes.append(f"The first {kept:,} of {n:,} pairs of heads are shown.")
    return notes


def _of_atlas(view: HeadAtlas) -> _Matrix:
    facts = view.spec.facts
    sites = facts["groups"][0]["sites"]
    if not facts["metrics"]:
        raise ReportError("the atlas has no metric to compare")
    shown = view.spec.blocks["values"][facts["first"]]
    grid = np.full((len(sites), max(site["heads"] for site in sites)), np.nan)
    for row, site in enumerate(sites):
        grid[row, : site["heads"]] = shown[site["start"] : site["start"] + site["heads"]]
    about = facts["metrics"][facts["first"]]
    rows = [f"L{site['layer']}" for site in sites]
    is_layer = [site["layer"] for site in sites] == list(range(len(sites)))
    selects = "head" if is_layer else "none"
    unit = about["unit"] or about["label"]
    return _Matrix(
        grid[None], (grid.shape[0], grid.shape[1]), 1, rows, (), ("layer", "head"), unit, selects,
        provenance=view.spec.provenance,
    )  # fmt: skip


def _table(first: _Matrix, second: _Matrix, values: Any) -> dict[str, Any]:
    """The cells that differ most."""
    difference = values[0].astype(np.float64) - values[1]
    size = np.nan_to_num(np.abs(difference).ravel(), nan=-1.0)
    best = np.argsort(-size, kind="stable")[:_ROWS_OF_TABLE]
    best = best[size[best] >= 0]
    pair, row, column = np.unravel_index(best, difference.shape)
    table: dict[str, Any] = {}
    if first.of and second.of:
        table = {f"head of {name}": [m.of[i]["label"] for i in pair] for name, m in (("A", first), ("B", second))}
    for title, at, names in ((first.titles[0], row, first.rows), (first.titles[1], column, first.columns)):
        table[title] = (at * first.block).astype(np.int32)
        if len(names):
            table[f"{title} name"] = [names[i * first.block] for i in at]
    a, b = (values[i].ravel()[best].astype(np.float64) for i in (0, 1))
    return table | {"A": a, "B": b, "difference": difference.ravel()[best]}


def _notes(first: _Matrix, second: _Matrix) -> list[str]:
    notes = []
    if first.block > 1:
        notes.append(f"Pooled: cells are the largest weights in blocks of {first.block} × {first.block} tokens.")
    if first.error or second.error:
        notes.append(f"In 8 bits: A and B are off by at most {max(first.error, second.error)}, A − B by their sum.")
    hidden = int(np.isnan(first.values).sum() != np.isnan(second.values).sum())
    if hidden:
        notes.append("Some cells exist in one of the two only; they have no difference.")
    return notes
