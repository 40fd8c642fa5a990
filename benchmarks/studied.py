"""What mechanisms learn on data of their own: generated actions, driving, crystals, lesions, spikes.

Trains what is missing of the plan, every form of every study with three seeds, seconds to half a minute each; ships
weights of seed 0 (workbench/mechanisms/weights/studies/), keeps the scores of all (studies.json), and says by rules
(benchmarks/trained/studies.py) what is found of the papers' claims, which the cards show. Writes its section of
docs/benchmarks.md. It may be stopped at any time, and goes on where it was.

What image models that are shipped do is measured beside (benchmarks/trained/shown.py).

    python benchmarks/studied.py [--minutes 30] [--only csa medusa] [--no-training] [--measure] [--quick] [--dry]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

import torch
from shared.measuring import say, write_section
from trained.runs import alone
from trained.shown import SHOWS, measured
from trained.studies import RULES, SEEDS, section

from workbench.mechanisms import studies
from workbench.mechanisms.studies.shipped import RUNS, read_runs
from workbench.mechanisms.studies.study import Studied, Study
from workbench.storage import disk

HEADING = "Mechanisms: studies"


def record(found: Studied) -> dict[str, Any]:
    """What is kept of a run."""
    told = ("arm", "seed", "steps", "parameters", "seconds", "torch")
    return {"mechanism": found.study.mechanism, "scores": found.scores} | {name: found.facts[name] for name in told}


def plan() -> list[tuple[Study, str, int]]:
    """Every form of every study, seed by seed."""
    return [(one, arm, seed) for seed in SEEDS for one in studies.studies().values() for arm in one.arms]


def steps_of(one: Study, arm: str) -> int:
    """Steps of all phases."""
    return sum(phase.steps for phase in one.phases(arm))


def train_missing(minutes: float, only: list[str]) -> None:
    """Train what of the plan is not there, until the time is over; kept at once, beside what others kept meanwhile."""
    began = time.monotonic()
    for one, arm, seed in plan():
        key = (one.mechanism, arm, seed)
        known = {(run["mechanism"], run["arm"], run["seed"]): run["steps"] for run in read_runs()}
        if (only and one.mechanism not in only) or known.get(key) == steps_of(one, arm):
            continue
        if time.monotonic() - began > 60 * minutes:
            break
        found = studies.run(one, arm, seed)
        if arm == one.main and seed == 0:
            path = studies.file_of(one.mechanism)
            path.parent.mkdir(parents=True, exist_ok=True)
            studies.save(found, path)
        with alone():
            others = [run for run in read_runs() if (run["mechanism"], run["arm"], run["seed"]) != key]
            keep([*others, record(found)])
        scores = ", ".join(f"{name} {value:.3f}" for name, value in found.scores.items())
        say(f"{one.mechanism}, {arm}, seed {seed}: {scores}; {found.facts['seconds']:.0f} s")


def read_measured() -> dict[str, list[float]]:
    """What was measured of shipped image models; empty before it was."""
    found: dict[str, list[float]] = (
        json.loads(RUNS.read_text(encoding="utf-8")).get("measured", {}) if RUNS.is_file() else {}
    )
    return found


def keep(runs: list[dict[str, Any]], found: dict[str, list[float]] | None = None) -> None:
    """Write the runs and what was measured, and what follows of the claims."""
    found = read_measured() if found is None else {name: [round(v, 4) for v in each] for name, each in found.items()}
    claims: dict[str, dict[str, Any]] = {}
    examined = [(rule, rule.examine(runs)) for rule in RULES] + [(rule, rule.examine(found)) for rule in SHOWS]
    for rule, one in examined:
        if one is not None:
            claims.setdefault(rule.mechanism, {})[rule.says] = asdict(one)
    order = sorted(runs, key=lambda run: (run["mechanism"], run["arm"], run["seed"]))
    lines = ",\n".join(json.dumps(run, sort_keys=True) for run in order)
    told = json.dumps(claims, ensure_ascii=False, indent=1, sort_keys=True)
    disk.write(RUNS, f'{{"claims": {told},\n"measured": {json.dumps(found)},\n"runs": [\n{lines}\n]}}\n')


def main() -> None:
    """Train, judge, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no training after as many")
    parser.add_argument("--only", nargs="+", default=[], help="mechanisms to train; all by default")
    parser.add_argument("--no-training", action="store_true", help="judge and write what is there")
    parser.add_argument("--measure", action="store_true", help="measure the shipped image models anew")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, and nothing is written")
    parser.add_argument("--dry", action="store_true", help="print the section, and write none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        runs = [record(studies.run(one, arm, seed, quick=True)) for one, arm, seed in plan() if seed < 2]
    else:
        if not options.no_training:
            train_missing(options.minutes, options.only)
        keep(runs := read_runs(), measured() if options.measure else None)
    told = section(runs, {} if options.quick else read_measured())
    if options.quick or options.dry:
        print(told)
    else:
        write_section(HEADING, told)


if __name__ == "__main__":
    main()
