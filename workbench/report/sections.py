"""What a report is made of before it is a page: sections with words, facts, figures and limits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.counting import count
from workbench.tokens import visible_text
from workbench.views.base.spec import ViewSpec

if TYPE_CHECKING:
    import pandas as pd

TABLE_ROWS = 50  # rows of a table on the page; the frame of a view shows as many


@dataclass
class Table:
    """A table that stands on the page as HTML: its first rows, as text."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    n_rows: int
    numeric: list[bool]

    @property
    def summary(self) -> str:
        """What is shown of how much."""
        shown = len(self.rows)
        return count(self.n_rows, "row") if shown == self.n_rows else f"the first {shown} of {self.n_rows:,} rows"

    def to_json(self) -> dict[str, Any]:
        """What a page says of it."""
        return {"caption": self.caption, "summary": self.summary, "columns": self.columns, "numeric": self.numeric,
                "rows": self.rows}  # fmt: skip


@dataclass
class Section:
    """One thing that was added.

    Attributes:
        heading: what the contents call it; None for words without a heading of their own.
        note: Markdown above everything else. prose: Markdown that is the thing itself.
        prompt: the text that a capture saw. facts: pairs to read.
        verdict: what a verification said, see `verdict.py`; None where there is nothing to verify.
        tables: tables on the page. figures: views, in order.
        limits: sentences for the limits of the report.
        origin: provenance of the section as JSON values. data: what went in, as JSON values.
    """

    heading: str | None = None
    note: str | None = None
    prose: str | None = None
    prompt: str | None = None
    facts: list[tuple[str, str]] = field(default_factory=list)
    verdict: dict[str, Any] | None = None
    tables: list[Table] = field(default_factory=list)
    figures: list[ViewSpec] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    origin: Mapping[str, Any] = field(default_factory=dict)
    data: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """What a page says of it; its figures are counted, their data stand in blocks of their own."""
        return {
            "heading": self.heading, "note": self.note, "prose": self.prose, "prompt": self.prompt,
            "facts": self.facts, "verdict": self.verdict, "tables": [table.to_json() for table in self.tables],
            "n_figures": len(self.figures),
        }  # fmt: skip


def table_of(frame: pd.DataFrame, caption: str) -> Table:
    """The head of a frame."""
    head = frame.head(TABLE_ROWS)
    return Table(
        caption=visible_text(caption),
        columns=[visible_text(str(name)) for name in frame.columns],
        rows=[[_cell(value) for value in row] for row in head.itertuples(index=False)],
        n_rows=len(frame),
        numeric=[frame[name].dtype.kind in "iuf" for name in frame.columns],
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.6g}"
    return visible_text(str(value))


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested provenance as pairs to read.

    >>> flat({"versions": {"torch": "2"}, "seeds": [1, 2]})
    [('versions torch', '2'), ('seeds', '1, 2')]
    """
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in flat(item, f"{prefix} {key}".strip())]
    if isinstance(value, str) or value is None:
        text = "unknown" if value is None else value
    elif isinstance(value, Sequence):
        text = ", ".join(str(item) for item in value)
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    else:
        text = f"{value:,}" if isinstance(value, int) and "seed" not in prefix else str(value)
    return [(visible_text(prefix.replace("_", " ")), visible_text(text))]


def figures_of(views: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Anchor, kind and title of the figures of these kinds and titles; charts are called by their titles.

    >>> figures_of([("head_atlas", "Entropy")])
    [{'id': 'fig-1-head-atlas', 'kind': 'head_atlas', 'title': 'Entropy'}]
    """
    found = []
    for number, (kind, title) in enumerate(views, 1):
        slug = re.sub(r"[^a-z0-9]+", "-", (title if kind == "figure" else kind).lower()).strip("-")[:40].strip("-")
        found.append({"id": f"fig-{number}-{slug or kind}", "kind": kind, "title": visible_text(title)})
    return found
