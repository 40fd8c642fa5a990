"""What mechanisms learn: each in the same small model, trained on the same data, seed and budget.

Trains what is missing of the plan (benchmarks/trained/plan.py), the most valuable first, one to two minutes each; ships
weights of seed 0 (workbench/mechanisms/weights/), keeps the scores of all seeds (runs.json), and says by rules that
were written before what is found of the papers' claims (claims.json, which the cards show). Writes its sections of
docs/benchmarks.md. It may be stopped at any time, and goes on where it was. Several processes may share the work:
`--part 0/2` and `--part 1/2` take every second run of the plan each.

    python benchmarks/rooms.py [--minutes 30] [--only sqa moh] [--work mqar] [--part 0/2] [--no-training] [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from shared.measuring import say, write_section
from trained.claims import examined
from trained.measured import beside
from trained.page import claims, reduced, section
from trained.plan import ROWS, STEPS, Model, plan, ships
from trained.runs import Runs

from workbench.errors import WorkbenchError
from workbench.mechanisms.frame.findings import FINDINGS
from workbench.mechanisms.training import TrainedModel, run_work
from workbench.mechanisms.training.shipped import file_of
from workbench.storage import disk

HEADING = "Mechanisms"


def record(model: Model, seed: int, found: TrainedModel) -> dict[str, Any]:
    """What is kept of a run."""
    facts = {name: found.facts[name] for name in ("steps", "rows", "parameters", "seconds", "python", "torch")}
    named = {"work": model.work, "name": model.name, "layout": model.layout, "hidden": found.model.stack.hidden}
    losses = [[step, round(loss, 4)] for step, loss in found.facts["losses"]]
    return named | {"seed": seed, "scores": found.scores, "losses": losses} | facts | beside(model.name, found)


def train(model: Model, seed: int, quick: bool = False) -> dict[str, Any]:
    """Train one, and ship it if it is one of those."""
    found = run_work(
        model.work, model.layers, hidden=model.hidden, seed=seed, steps=STEPS[model.work], rows=ROWS[model.work],
        quick=quick,
    )  # fmt: skip
    if ships(model) and seed == 0 and not quick:
        path = file_of(model.name, model.work)
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    return record(model, seed, found)


def train_missing(runs: Runs, minutes: float, wanted: Callable[[Model], bool], part: tuple[int, int]) -> None:
    """Train what of the plan is not there, until the time is over.

    Args:
        wanted: which models. part: (k, n): of what is not there now every n-th run, from the k-th on.
    """
    began, refused = time.monotonic(), set[Model]()
    missing = [(model, seed) for model, seed in plan() if wanted(model) and not _has(runs, model, seed)]
    for model, seed in missing[part[0] :: part[1]]:
        if model in refused:
            continue
        try:
            if time.monotonic() - began > 60 * minutes:
                return
            made = train(model, seed)
        except WorkbenchError as error:  # it cannot stand there
            refused.add(model)
            say(f"{model.work}, {model}: {error}")
            continue
        runs.add(made)
        scores = ", ".join(f"{name} {value:.3f}" for name, value in made["scores"].items())
        say(f"{model.work}, {model}, seed {seed}: {scores}; {made['seconds']:.0f} s")


def _has(runs: Runs, model: Model, seed: int) -> bool:
    """Whether a run is there; of what cannot stand in its work there is none."""
    try:
        return runs.has(model, seed, STEPS[model.work], ROWS[model.work])
    except WorkbenchError as error:
        say(f"{model.work}, {model}: {error}")
        return True


def _part(text: str) -> tuple[int, int]:
    """(k, n) of "k/n", k from 0 on."""
    k, n = (int(number) for number in text.split("/"))
    if not 0 <= k < n:
        raise ValueError(text)
    return k, n


def main() -> None:
    """Train, judge, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no training after as many")
    parser.add_argument("--only", nargs="+", default=[], help="mechanisms to train; all by default")
    parser.add_argument("--work", nargs="+", default=list(STEPS), choices=STEPS, help="all works by default")
    parser.add_argument("--part", type=_part, default=(0, 1), help="such as 0/2 and 1/2 of two processes")
    parser.add_argument("--no-training", action="store_true", help="judge and write what is there")
    parser.add_argument("--quick", action="store_true", help="a few steps of two models, and nothing is written")
    parser.add_argument("--dry", action="store_true", help="print the sections, and write none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        runs = Runs([train(model, 0, quick=True) for model, _ in plan()[:2]])
    else:
        runs = Runs.read()
        if not options.no_training:
            only, works = options.only, options.work
            train_missing(
                runs,
                options.minutes,
                lambda model: model.work in works and (not only or model.name.partition(":")[0] in only),
                options.part,
            )
            runs = Runs.read()
    found = list(examined(runs))
    quiet = options.quick or options.dry
    put = (lambda heading, text: print(f"## {heading}\n\n{text}\n")) if quiet else write_section
    for work in STEPS:
        if runs.models(work):
            put(f"{HEADING}: {work}", section(work, runs))
    put(f"{HEADING}: claims of quality", claims(found))
    if alike := reduced(runs):
        put(f"{HEADING}: heads of reduced transformers", alike)
    if not quiet:
        disk.write(FINDINGS, findings(found))


def findings(found: list[Any]) -> str:
    """The file that the cards read."""
    by_card: dict[str, dict[str, Any]] = {}
    for rule, one in found:
        by_card.setdefault(rule.mechanism, {})[rule.says] = asdict(one)
    return json.dumps(by_card, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    main()
