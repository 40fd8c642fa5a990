"""The investigator against a fixed pipeline of the same analyses, with the same budgets, on planted circuits.

Ten models with a planted circuit and three without; what counts is whether the verdict is right and the heads named
are those that were planted, no more and no less, what it cost, and how much of the time was the investigator's own.

    python benchmarks/investigator.py [--prompts 24] [--budgets 800 1500 20000]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shared.measuring import say, table

import workbench
from workbench.models.planted import KINDS, WITHOUT, Planted, planted

FIXED = (
    {"analysis": "all_heads"},
    {"analysis": "importance", "arguments": {"how": "mean"}},
    {"analysis": "circuit", "arguments": {"method": "eap_ig", "threshold": 0.03}},
    {"analysis": "faithfulness"},
    {"analysis": "minimality", "arguments": {"threshold": 0.02}},
    {"analysis": "faithfulness"},
    {"analysis": "roles"},
)
"""What the pipeline runs, whatever it finds; the same analyses and thresholds that the rules begin with."""


@dataclass(frozen=True)
class Way:
    """One way to investigate: its name, and how it is called."""

    name: str
    options: Callable[[], dict[str, Any]]


def _fixed(prompt: str) -> str:
    return json.dumps({"why": "as always", "because": [0], "steps": FIXED})


WAYS = (
    Way("investigator", dict),
    Way("fixed pipeline", lambda: {"planner": _fixed, "proactive": False}),
)


def run(way: Way, made: Planted, forwards: int) -> tuple[bool, workbench.Investigation]:
    """Whether the verdict and the heads are right, and the investigation."""
    with workbench.attach(made.model, made.tokenizer) as wb:
        found = workbench.investigate(wb, made.task, forwards=forwards, progress=False, **way.options())
    return set(found.heads) == set(made.heads) and found.verdict == ("circuit" if made.heads else "none"), found


def main() -> None:
    """Print a table for each budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--budgets", type=int, nargs="+", default=[800, 1500, 20_000])
    given = parser.parse_args()
    kinds = [kind for kind in KINDS if kind not in WITHOUT]
    models = [planted(kind, seed, given.prompts) for kind in kinds for seed in (0, 1)]
    models += [planted(kind, 0, given.prompts) for kind in WITHOUT]
    rows, own, busy = [], 0.0, 0.0
    for budget in given.budgets:
        for way in WAYS:
            say(f"{way.name}, {budget:,} forwards")
            results = [run(way, made, budget) for made in models]
            right = [sum(good for good, _ in part) for part in (results[:10], results[10:])]
            spent = [statistics.mean(one.forwards for _, one in part) for part in (results[:10], results[10:])]
            if way.name == "investigator":
                own, busy = (
                    own + sum(one.own_seconds for _, one in results),
                    busy + sum(one.seconds for _, one in results),
                )
            rows.append(
                [f"{budget:,}", way.name, f"{right[0]} of 10", f"{right[1]} of 3", *(f"{n:,.0f}" for n in spent)]
            )
    head = ["budget, forwards", "way", "circuits found", "said that there is none", "forwards, with", "without"]
    print(table(head, rows))
    print(f"\nThe investigator's own work took {own / busy:.2%} of its analyses' {busy:.1f} s (without files).")


if __name__ == "__main__":
    main()
