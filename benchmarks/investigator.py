"""The investigator against a fixed pipeline of the same analyses, with the same budgets, on planted circuits.

Ten models with a planted circuit and three without; what counts is whether the verdict is right and the heads named
are those that were planted, no more and no less, what it cost, and how much of the time was the investigator's own.
Writes `results.json` beside the investigator, which Agent S2's card reads.

    python benchmarks/investigator.py [--prompts 16] [--budgets 700 1500 20000]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from shared.measuring import say, table

import workbench
from workbench import investigator
from workbench.analysis.statistics.intervals import mean_t, proportions
from workbench.models.planted import KINDS, WITHOUT, Planted, planted

RESULTS = Path(investigator.__file__).parent / "results.json"
FIXED = (
    {"analysis": "all_heads"},
    {"analysis": "importance", "arguments": {"how": "mean"}},
    {"analysis": "circuit", "arguments": {"method": "eap_ig", "threshold": 0.03}},
    {"analysis": "faithfulness"},
    {"analysis": "minimality", "arguments": {"threshold": 0.02}},
    {"analysis": "faithfulness"},
    {"analysis": "roles"},
)
"""What the pipeline runs, whatever it finds; the analyses and thresholds that the rules begin with."""


def fixed(prompt: str) -> str:
    """A planner that always plans the same, and goes on behind what failed."""
    done = len(json.loads(prompt.split("What is known:\n")[1])["findings"]) - 1
    return json.dumps({"why": "as always", "because": [0], "steps": FIXED[done:]})


WAYS: dict[str, dict[str, Any]] = {
    "investigator": {},
    "its first plan, anew after failures only": {"proactive": False},
    "fixed pipeline": {"planner": fixed, "proactive": False},
}


def run(options: dict[str, Any], made: Planted, forwards: int) -> tuple[bool, workbench.Investigation]:
    """Whether the verdict and the heads are right, and the investigation."""
    with workbench.attach(made.model, made.tokenizer) as wb:
        found = workbench.investigate(wb, made.task, forwards=forwards, progress=False, **options)
    return set(found.heads) == set(made.heads) and found.verdict == ("circuit" if made.heads else "none"), found


def main() -> None:
    """Print a table, and write what the card tells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--budgets", type=int, nargs="+", default=[700, 1500, 20_000])
    given = parser.parse_args()
    kinds = [kind for kind in KINDS if kind not in WITHOUT]
    models = [planted(kind, seed, given.prompts) for kind in kinds for seed in (0, 1)]
    models += [planted(kind, 0, given.prompts) for kind in WITHOUT]
    with_circuit = [bool(made.heads) for made in models]
    rows, held, own, busy = [], dict[str, Any](), 0.0, 0.0
    for budget in given.budgets:
        for way, options in WAYS.items():
            say(f"{way}, {budget:,} forwards")
            results = [run(options, made, budget) for made in models]
            right = [good for good, _ in results]
            spent = [one.forwards for _, one in results]
            if way == "investigator":
                own += sum(one.own_seconds for _, one in results)
                busy += sum(one.seconds for _, one in results)
            held[f"{budget} {way}"] = {"right": right, "forwards": spent}
            parts = [[i for i, there in enumerate(with_circuit) if there == wanted] for wanted in (True, False)]
            counts = [_share([right[i] for i in part]) for part in parts]
            means = [f"{statistics.mean(spent[i] for i in part):,.0f}" for part in parts]
            rows.append([f"{budget:,}", way, *counts, *means])
    head = ["budget", "way", "circuits found", "said that there is none", "forwards, with", "forwards, without"]
    print(table(head, rows))
    print("\nThe investigator minus another way, paired over the models, mean and 95 % t interval:\n")
    first, *others = WAYS
    gaps = [
        [f"{budget:,}", other, *(_gap(held, budget, first, other, what) for what in ("right", "forwards"))]
        for budget in given.budgets for other in others
    ]  # fmt: skip
    print(table(["budget", "the other way", "right", "forwards"], gaps))
    share = own / busy
    print(f"\nThe investigator's own work took {share:.2%} of its analyses' {busy:.1f} s.")
    claim = _claim(given.budgets[0], held)
    RESULTS.write_text(json.dumps({"claim": claim, "own_share": share, "ways": held}, indent=1) + "\n")


def _share(right: list[bool]) -> str:
    """How many are right, with the exact interval of their share."""
    low, high = proportions(torch.tensor(right, dtype=torch.float64)).tolist()
    return f"{sum(right)} of {len(right)} [{low:.0%}, {high:.0%}]"


def _gap(held: dict[str, Any], budget: int, one: str, other: str, what: str) -> str:
    """A paired difference with its interval."""
    a, b = (torch.tensor(held[f"{budget} {way}"][what], dtype=torch.float64) for way in (one, other))
    low, high = mean_t(a - b)
    form = "{:+.0%} [{:+.0%}, {:+.0%}]" if what == "right" else "{:+,.0f} [{:+,.0f}, {:+,.0f}]"
    return form.format(float((a - b).mean()), low, high)


def _claim(budget: int, held: dict[str, Any]) -> dict[str, str]:
    """Planning anew after every finding against doing so after failures only, at the smallest budget."""
    eager, other = (held[f"{budget} {way}"] for way in list(WAYS)[:2])
    gap = torch.tensor(eager["right"], dtype=torch.float64) - torch.tensor(other["right"], dtype=torch.float64)
    mean, (low, high) = float(gap.mean()), mean_t(gap)
    n = len(gap)
    return {
        "how": f"benchmarks/investigator.py, {n} models of which 10 have a planted circuit, {budget:,} forwards each",
        "found": f"right on {sum(eager['right'])} of {n} against {sum(other['right'])}, {mean:+.0%} "
        f"[{low:+.0%}, {high:+.0%}], with {statistics.mean(eager['forwards']):,.0f} against "
        f"{statistics.mean(other['forwards']):,.0f} forwards",
        "outcome": "holds" if low > 0 else "does not hold" if high < 0 else "undecided",
    }


if __name__ == "__main__":
    main()
