"""Writes docs/statistics.md from the records of the statistics.

python docs/make_statistics.py
"""

from __future__ import annotations

import math
from pathlib import Path

from workbench.kernels.statistics import STATISTICS, VALUE_WEIGHTED, Statistic

PAGE = Path(__file__).parent / "statistics.md"
AXES = {"query": "query", "key": "key", "query top": "query, n", "block": "query block, key block"}
_HEAD = """# Statistics

What `wb.capture(statistics=...)` and `pattern.statistics(...)` can find of each head, in memory that grows with the
length alone. p is one row A[b, h, i, :] over the keys that query i may see; of signed or unnormalised patterns, |A|
normalised per row. Shapes begin with batch and head. Rows that see no key have NaN (`lse`: −∞, keys: −1). The
definitions run in float64 in `kernels/statistics/`, one file each; `workbench.statistic` registers one of your own.

| Name | Axes | Unit | Range | What it is | Formula |
| --- | --- | --- | --- | --- | --- |
"""
_TAIL = f"""
All but those marked ¹ also exist as `{VALUE_WEIGHTED}<name>`: of p·‖v‖ renormalised per row (arXiv 2004.10102); a
row all of whose values are zero is as one that sees no key. Those marked ² compare positions of queries and keys, so
that cross-attention has none of them.
"""


def page() -> str:
    """The page."""
    return _HEAD + "".join(map(_row, STATISTICS.values())) + _TAIL


def _row(statistic: Statistic) -> str:
    marks = ("" if statistic.value_weighted else "¹") + ("²" if statistic.positional else "")
    low, high = (
        "−∞" if n == -math.inf else "∞" if n == math.inf else f"{n:g}".replace("-", "−") for n in statistic.range
    )
    gives = "" if statistic.outputs == (statistic.name,) else ": " + ", ".join(f"`{out}`" for out in statistic.outputs)
    name = f"`{statistic.name}`{marks}{gives}"
    meaning, formula = statistic.meaning.replace("|", r"\|"), f"$`{statistic.formula}`$"
    return f"| {name} | {AXES[statistic.axes]} | {statistic.unit} | {low} … {high} | {meaning} | {formula} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
