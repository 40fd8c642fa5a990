"""Table: named rows and columns of texts and numbers; each column of numbers is shaded by itself."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from workbench.counting import count
from workbench.errors import ReportError
from workbench.tokens import visible_text
from workbench.views.base import scales
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import Array, ViewSpec
from workbench.views.base.view import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Better = Literal["high", "low"] | None
_DEEPEST = 0.55  # of the colour scale, as in the view's module
_ROWS = 40  # of the still picture
_LINE, _CHARACTER = 0.19, 0.075  # inches
_WIDEST = 60  # characters of a line of text in the picture


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading; no two columns of a table share one.
        values: a number (NaN is not known) or a text for each row.
        group: columns beside each other with the same one have one heading over theirs.
        better: whether "high" or "low" numbers are good, and shaded; None for neither: from zero up.
        span: of good and bad numbers, the least difference that is shaded from one end to the other, so that what
            hardly differs looks alike; None for that between the worst and the best.
        said: more on each cell, shown when one points at it.
    """

    name: str
    values: Sequence[float] | Sequence[str]
    group: str = ""
    better: Better = None
    span: float | None = None
    said: Sequence[str] | None = None

    @property
    def is_text(self) -> bool:
        """Whether it holds texts."""
        return any(isinstance(value, str) for value in self.values)


class Table(View):
    """See `table`."""

    def picture(self, figure: Figure) -> None:
        facts, columns = self.spec.facts, self.spec.facts["columns"]
        order = self._order()[:_ROWS]
        texts = [[_wrapped(each) for each in (facts["rows"][row]["label"] for row in order)]]
        texts += [[_wrapped(self._short(column, row)) for row in order] for column in columns]
        heads = [_wrapped(name, 12) for name in (facts["of"], *(column["name"] for column in columns))]
        widths = [max(_width(text) for text in (head, *cells)) + 2 for head, cells in zip(heads, texts, strict=True)]
        lines = [max(_lines(cells[i]) for cells in texts) for i in range(len(order))]
        top, whole = max(map(_lines, heads)), sum(widths)
        figure.set_layout_engine("none")
        figure.set_size_inches(max(3.0, whole * _CHARACTER), (top + sum(lines) + 1) * _LINE)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, whole), ylim=(top + sum(lines) + 0.7, -0.3))
        left = 0.0
        for at, (head, cells, width) in enumerate(zip(heads, texts, widths, strict=True)):
            numbers = at > 0 and columns[at - 1]["block"] is not None
            axes.text(left + (width - 1 if numbers else 0.6), top - 0.2, head, fontsize=8, va="bottom", linespacing=1.1,
                      ha="right" if numbers else "left", weight="bold" if at == 0 else "normal")  # fmt: skip
            shades = self._shades(columns[at - 1]) if numbers else None
            down = float(top)
            for row, cell, height in zip(order, cells, lines, strict=True):
                self._cell(axes, cell, (left, down, width, height), None if shades is None else shades[row])
                down += height
            left += width

    def _cell(self, axes: Any, text: str, box: tuple[float, float, float, float], shade: str | None) -> None:
        from matplotlib.patches import Rectangle

        left, down, width, height = box
        look: dict[str, Any] = {"fontsize": 8, "va": "center", "linespacing": 1.1}
        if shade is None:
            axes.text(left + 0.6, down + height / 2, text, ha="left", **look)
            return
        axes.add_patch(Rectangle((left + 0.1, down + 0.04), width - 0.2, height - 0.08, color=shade, linewidth=0))
        axes.text(left + width - 1, down + height / 2, text, ha="right", color=scales.ink_on(shade), **look)

    def _short(self, column: Mapping[str, Any], row: int) -> str:
        if column["block"] is None:
            return str(column["texts"][row])
        value = float(self.spec.blocks["numbers"][column["block"], row])
        return f"{value:.3g}" if np.isfinite(value) else "–"

    def _order(self) -> list[int]:
        """Rows as the state has them; what is not known comes last."""
        facts, state = self.spec.facts, self.state
        column = next((each for each in facts["columns"] if each["name"] == state.get("sort")), None)
        rows = list(range(len(facts["rows"])))
        if column is None:
            return rows
        held = column["texts"] if column["block"] is None else self.spec.blocks["numbers"][column["block"]].tolist()
        known = [row for row in rows if held[row] != "" and held[row] == held[row]]
        lost = [row for row in rows if row not in known]
        ranked = sorted(known, key=lambda row: held[row], reverse=not state.get("rising", False))
        return [*ranked, *lost]

    def _shades(self, column: Mapping[str, Any]) -> list[str]:
        from matplotlib.colors import to_hex

        values, scale = self.spec.blocks["numbers"][column["block"]], scales.sequential()
        return [
            scales.unseen_colour() if np.isnan(depth) else str(to_hex(scale(_DEEPEST * float(depth))))
            for depth in _depths(values, column["better"], column["span"])
        ]


def _depths(values: Array, better: str | None, span: float | None = None) -> Array:
    """From 0 for the worst known number to at most 1 for the best, or in their proportion; NaN where not known."""
    known = values[np.isfinite(values)]
    found = np.where(np.isfinite(values), values, np.nan)
    if not known.size:
        return found
    low, high = known.min(), known.max()
    if better is None:
        return np.maximum(found, 0) / high if high > 0 else found * 0
    whole = max(high - low, span or 0.0)
    return (found - low if better == "high" else high - found) / whole if whole > 0 else found * 0


def table(
    rows: Sequence[str],
    columns: Sequence[Column],
    *,
    of: str = "",
    about: Sequence[str] | None = None,
    places: Sequence[str | None] | None = None,
    title: str = "Table",
    caption: str = "",
    notes: tuple[str, ...] = (),
    provenance: Mapping[str, Any] | None = None,
    selection: SharedSelection | None = None,
) -> Table:
    """Things with a name each, and what is known of them: numbers are shaded within their column, and headings sort.

    Args:
        rows: names of the things. of: what they are, such as "mechanism". about: of each a few words, below its name.
        columns: what is known of them, a number or text each.
        places: for each row a section of the page to go to, such as "section-3"; None for none.

    Raises:
        ReportError: no row or column, columns of other lengths than the rows, or two of one name.

    >>> table(["a", "b"], [Column("loss", [0.5, 0.25], better="low")], of="model").data()
      model  loss
    0     a  0.50
    1     b  0.25
    """
    if not rows or not columns:
        raise ReportError("a table has at least one row and one column")
    names = [visible_text(each.name) for each in columns]
    if len(set(names)) < len(names):
        raise ReportError("two columns have the same name", hint="names tell them apart where a table is sorted")
    for each in columns:
        for what, given in {
            "values": each.values,
            "texts said": each.said,
            "places": places,
            "words about them": about,
        }.items():
            if given is not None and len(given) != len(rows):
                raise ReportError(f"the table has {len(rows)} rows, and {len(given)} {what} ({each.name})")
    labels, blank = [visible_text(each) for each in rows], [""] * len(rows)
    shown = [_facts(each) for each in columns]
    numbers = [np.asarray(each.values, dtype=np.float64) for each in columns if not each.is_text]
    for at, fact in enumerate(fact for fact in shown if fact["texts"] is None):
        fact["block"] = at
    spec = ViewSpec(
        kind="table",
        title=title,
        caption=caption or f"{count(len(rows), 'row')}.",
        facts={
            "of": visible_text(of),
            "rows": [
                {"label": label, "about": visible_text(words), "place": place}
                for label, words, place in zip(labels, about or blank, places or [None] * len(rows), strict=True)
            ],
            "columns": shown,
        },
        blocks={"numbers": np.stack(numbers) if numbers else np.zeros((0, len(rows)))},
        table={
            visible_text(of) or "name": labels,
            **{
                fact["name"]: fact["texts"] if fact["block"] is None else numbers[fact["block"]]
                for fact in shown
            },
        },
        notes=notes,
        provenance=provenance or {},
    )  # fmt: skip
    return Table(spec, selection)


def _facts(column: Column) -> dict[str, Any]:
    return {
        "name": visible_text(column.name),
        "group": visible_text(column.group),
        "better": column.better,
        "span": column.span,
        "block": None,
        "texts": [visible_text(str(value)) for value in column.values] if column.is_text else None,
        "said": None if column.said is None else [visible_text(each) for each in column.said],
    }


def _wrapped(text: str, longest: int = _WIDEST) -> str:
    return "\n".join(textwrap.wrap(text, longest) or [""])


def _width(text: str) -> int:
    return max(map(len, text.split("\n")))


def _lines(text: str) -> int:
    return text.count("\n") + 1
