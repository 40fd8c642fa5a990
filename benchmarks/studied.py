"""What mechanisms learn on data of their own: generated actions, driving, crystals, lesions, spikes.

Trains what is missing of the plan, every form of every study with three seeds, seconds to half a minute each; ships
weights of seed 0 (workbench/mechanisms/weights/studies/), keeps the scores of all (studies.json), and says by rules
(benchmarks/trained/studies.py) what is found of the papers' claims, which the cards show. Writes its section of
docs/benchmarks.md. It may be stopped at any time, and goes on where it was.

    python benchmarks/studied.py [--minutes 30] [--only csa medusa] [--no-training] [--quick] [--dry]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

import torch
from shared.measuring import say, write_section
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
        others = [run for run in read_runs() if (run["mechanism"], run["arm"], run["seed"]) != key]
        keep([*others, record(found)])
        scores = ", ".join(f"{name} {value:.3f}" for name, value in found.scores.items())
        say(f"{one.mechanism}, {arm}, seed {seed}: {scores}; {found.facts['seconds']:.0f} s")


def keep(runs: list[dict[str, Any]]) -> None:
    """Write the runs, and what follows of the claims."""
    claims: dict[str, dict[str, Any]] = {}
    for rule in RULES:
        if (found := rule.examine(runs)) is not None:
            claims.setdefault(rule.mechanism, {})[rule.says] = asdict(found)
    order = sorted(runs, key=lambda run: (run["mechanism"], run["arm"], run["seed"]))
    lines = ",\n".join(json.dumps(run, sort_keys=True) for run in order)
    told = json.dumps(claims, ensure_ascii=False, indent=1, sort_keys=True)
    disk.write(RUNS, f'{{"claims": {told},\n"runs": [\n{lines}\n]}}\n')


def main() -> None:
    """Train, judge, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no training after as many")
    parser.add_argument("--only", nargs="+", default=[], help="mechanisms to train; all by default")
    parser.add_argument("--no-training", action="store_true", help="judge and write what is there")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, and nothing is written")
    parser.add_argument("--dry", action="store_true", help="print the section, and write none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        runs = [record(studies.run(one, arm, seed, quick=True)) for one, arm, seed in plan() if seed < 2]
    else:
        if not options.no_training:
            train_missing(options.minutes, options.only)
        keep(runs := read_runs())
    told = section(runs)
    if options.quick or options.dry:
        print(told)
    else:
        write_section(HEADING, told)


if __name__ == "__main__":
    main()
