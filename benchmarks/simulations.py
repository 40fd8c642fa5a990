"""Whether p-values are uniform and intervals hold what they promise, where the truth is known.

Every interval and p-value that the package prints, and who prints it (benchmarks/simulated/printed.py), is simulated,
with seeds. Writes docs/simulations.md.

    python benchmarks/simulations.py [--pairs 400] [--samples 400] [--keep FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from simulated import few, overlap
from simulated.intervals import INTERVALS
from simulated.printed import OTHERS, PRINTED

PAGE = Path(__file__).parents[1] / "docs" / "simulations.md"
BY = {
    "mean": "Student's t", "median": "order statistics", "proportion": "Clopper and Pearson", "share": "Fieller",
    "size of a share": "Fieller", "area under shares": "Fieller", "corpus area": "jackknife, t",
    "capacity curve": "jackknife, t", "n*": "jackknife, t", "correlation of curves": "jackknife of z, t",
    "rank correlation": "z, Bonett and Wright", "standard error": "± 1.96 standard errors",
    "overlap of heads": "spread of redrawn prompts, t", "overlap of edges": "spread of redrawn prompts, t",
    "stability": "means",
}  # fmt: skip


def written(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines)


class Kept:
    """What has been simulated, in a folder to go on from; nothing is kept without one."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def of(self, name: str, made: Callable[[], Any]) -> Any:
        """What is there under this name, or is made now."""
        file = self.folder / f"{name}.json" if self.folder else None
        if file is not None and file.exists():
            return json.loads(file.read_text())
        found = made()
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found))
        return found


def main() -> None:
    """Simulate, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument(
        "--keep", type=Path, help="a folder that keeps what is done, to go on from with the same numbers"
    )
    parser.add_argument("--quick", action="store_true", help="few of each, and nothing is written")
    options = parser.parse_args()
    n, samples = (10, 200) if options.quick else (options.pairs, options.samples)
    kept = Kept(None if options.quick else options.keep)
    p_rows: dict[str, list[list[str]]] = {"edges: renamed": [], "edges: degrees": []}
    for number in range(len(overlap.P_ROWS)):
        for name, row in kept.of(f"p-{n}-{number}", partial(overlap.p_row, number, n)).items():
            p_rows[name].append(row)
    p_rows |= kept.of(f"mass-{n}", partial(overlap.mass_rows, n))
    rows: list[list[str]] = []
    for name, made in INTERVALS.items():
        found = kept.of(f"{name.replace(' ', '-')}-{samples}", lambda made=made: list(made(samples)))
        rows += [[name, BY[name], *row] for row in found]
    for name, items, size in (("overlap of heads", 48, 12), ("overlap of edges", 1000, 100)):
        found = kept.of(f"{name.replace(' ', '-')}-{samples}", partial(overlap.interval_rows, items, size, samples))
        rows += [[name, BY[name], *row] for row in found]
    found = kept.of(f"stability-{n}", partial(overlap.stability_rows, n // 4))
    rows += [["stability", BY["stability"], *row] for row in found]
    carried = kept.of(f"few-{samples}", partial(few.few_rows, samples))
    text = page(n, samples, p_rows, rows, carried)
    if options.quick:
        print(text)
        return
    PAGE.write_text(text)
    print(f"wrote {PAGE}")


def page(
    n: int, samples: int, p_rows: dict[str, list[list[str]]], rows: list[list[str]], carried: list[list[str]]
) -> str:
    """The whole page."""
    levels = [f"p ≤ {level:g}" for level in overlap.LEVELS]
    chance = written(
        ["p-value", "scores", "size", "pruned", *levels, "in the middle 95 %"],
        [[name, *row] for name, several in p_rows.items() for row in several],
    )
    covered = written(["interval", "by", "of", "n", "holds the truth", "there is one"], rows)
    by_row: dict[str, list[str]] = {}
    for (function, module), (what, names) in PRINTED.items():
        for name in names:
            by_row.setdefault(name, []).append(f"{what} (`{module}`, `{function}`)")
    for what, names in OTHERS.items():
        for name in names:
            by_row.setdefault(name, []).append(what)
    places = written(["row", "who prints it"], [[name, "; ".join(several)] for name, several in by_row.items()])
    return f"""# Simulations

Made by `python benchmarks/simulations.py`, with its seeds. What the words mean is in [circuits.md](circuits.md).

## p-values of overlap

{n} pairs of circuits for each row, {overlap.DRAWS} draws for each p, on the graph of a model of 6 layers of 8 heads
({overlap.GRAPH.n_edges:,} edges). Scores are independent in all rows but the two that share some, so that p should be
at most .05 in .05 of the pairs, at most .5 in half of them, and so on. By renamed heads it is; where circuits were
pruned, and by degrees, p errs on the safe side. Node effects are log-normal factors on all
edges of a sender and of a receiver, of the spread that is given, drawn anew for each circuit. Where a share of the
edges is the same in both, it should be found. The last column is how often the measured overlap lies in the middle 95 %
of what chance gives.

{chance}

## Intervals at 95 %

{samples} samples for most rows. Coverage is of the samples in which there is an interval. Shares have the true value .7
and a denominator whose mean is as many standard errors above 0 as is given; there is none where the denominator's own
holds 0. A top-1 that all draws of pairs agree on has an interval of no width, so that it holds less near 1. Intervals
of an overlap are of the mean overlap of circuits that are found with as many new prompts; those of circuits that
overlap in the same way in nearly every draw have no width either. Of stability the three means are given, of {n // 4}
circuits: new prompts lie between halves and redrawn ones, or at their upper end.

{covered}

## Means that few examples carry

No interval holds a mean that rare examples make and the sample lacks. Of eight examples or more there is none where too
few carry the spread (`carried_by_few`): less than 0.38 n, and of more than 24 less than 1.1 n^⅔. So, from 24 examples
on, about one sample in ten at most is given an interval that is wrong; of fewer the check finds the coarsest tails, and
of a kind that is rarer than 3 in n no sample tells. Where most samples of a kind have none, the few that have one are
those that lack the tail, and theirs is wrong more often. Light tails keep their intervals. Shares,
and strengths of conditioning, are not checked. {5 * samples:,} samples a
row; of demo-lm {samples} samples of its prompts, each of all heads.

{written(few.HEADS, carried)}

## Who prints them

{places}
"""


if __name__ == "__main__":
    main()
