"""The limits of a report, made from facts: what was cut, pooled, not verified, or seen only once."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.counting import count, numbered
from workbench.report.sections import TABLE_ROWS, Section
from workbench.tokens import visible_text


def limits(sections: Sequence[Section]) -> list[str]:
    """One sentence each."""
    found = []
    captures = [section for section in sections if section.data is not None]
    if captures:
        n = count(len(captures), "example")
        found.append(f"The captures are of {n}, one forward each: how much varies over others is not shown.")
    of_figures: dict[str, list[int]] = {}  # what several figures say is said once
    number = 0
    for i, section in enumerate(sections, 1):
        where = f"Section {i}" + (f", {section.heading}" if section.heading else "")
        found += [f"{where}: {limit}." for limit in section.limits]
        cut = [table for table in section.tables if len(table.rows) < table.n_rows]
        found += [f"{where}: the table “{table.caption}” has {table.summary}." for table in cut]
        for spec in section.figures:
            number += 1
            rows = len(next(iter(spec.table.values()), ()))
            said = [visible_text(note) for note in spec.notes]
            if rows > TABLE_ROWS:
                left = spec.left_out
                has = f"those {rows:,} and leaves out {left:,}" if left else "them all"
                said.append(f"its table shows the first {TABLE_ROWS} of {rows:,} rows; the CSV has {has}.")
            for each in said:
                of_figures.setdefault(each, []).append(number)
    for said_once, numbers in of_figures.items():
        found.append(f"{numbered('Figure', numbers)}: {said_once}")
    return found
