"""Papers that look and remember, at a small scale: V2P, Agent S2's grounding, SAM2Act's memory, SAM2Long's tree.

Trains what is missing of the plan, three seeds of every arm, less than a minute each on one core, and keeps scores
beside the code (`workbench/mechanisms/screens/results.json`, `…/remembering/results.json`), from which the cards say
where claims stand. May be stopped at any time, and goes on where it was. Writes its section of docs/benchmarks.md.

    python benchmarks/seeing.py [--only v2p sam2act sam2long] [--no-training] [--quick]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import torch
from shared.measuring import machine, say, table, write_section

from workbench.analysis.statistics.intervals import mean_t
from workbench.mechanisms import remembering, screens
from workbench.mechanisms.remembering import occlusion
from workbench.mechanisms.remembering.card import RESULTS as REMEMBERED
from workbench.mechanisms.remembering.card import sam2act_card, sam2long_card
from workbench.mechanisms.screens.card import RESULTS as POINTED
from workbench.mechanisms.screens.card import agent_s2_grounding_card, v2p_card
from workbench.mechanisms.screens.study import mixed, pointed
from workbench.storage import disk

HEADING = "Looking and remembering: V2P, Agent S2's grounding, SAM2Act, SAM2Long"
SEEDS = (0, 1, 2)
VIDEOS, EPISODES, SCREENS = 100, 1000, 600
_HELD_OUT = 900_100


def v2p(arm: str, seed: int, quick: bool) -> dict[str, Any]:
    """A pointer, or boxes; and, of V2P's, what experts make of screens with it."""
    n = 40 if quick else SCREENS
    model = screens.train(arm, seed, 2 if quick else None)
    found = {"scores": pointed(model, n)}
    return found | ({"mixture": mixed(model, seed, n)} if arm == "v2p" else {})


def sam2act(arm: str, seed: int, quick: bool) -> dict[str, Any]:
    """A mover on episodes that it was not trained on."""
    model = remembering.train(arm, seed, 2 if quick else remembering.blocks.STEPS)
    return {"scores": remembering.solved(model, remembering.draw_episodes(20 if quick else EPISODES, _HELD_OUT))}


def sam2long(arm: str, seed: int, quick: bool) -> dict[str, Any]:
    """A tracker on videos; each seed has its own."""
    first = _HELD_OUT + 10_000 * seed
    rates = [occlusion.follow(occlusion.draw_video(first + i), arm)[1] for i in range(4 if quick else VIDEOS)]
    return {"scores": {"frames": fmean(rates), "lost": fmean(rate < 0.5 for rate in rates)}}


PLAN: dict[str, tuple[Mapping[str, str], Callable[[str, int, bool], dict[str, Any]], Any]] = {
    "v2p": (screens.ARMS, v2p, POINTED),
    "sam2act": (remembering.ARMS, sam2act, REMEMBERED),
    "sam2long": (remembering.TRACKERS, sam2long, REMEMBERED),
}


def read(path: Any) -> list[dict[str, Any]]:
    """The runs that are kept."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []


def measure(only: list[str], quick: bool) -> None:
    """Train and score what is missing."""
    for seed in SEEDS:
        for paper, (arms, run, path) in PLAN.items():
            for arm in arms if not only or paper in only else ():
                known = {(one["paper"], one["arm"], one["seed"]) for one in read(path)}
                if (paper, arm, seed) in known and not quick:
                    continue
                found = {"paper": paper, "arm": arm, "seed": seed} | _rounded(run(arm, seed, quick))
                said = ", ".join(f"{name} {value:.3f}" for name, value in found["scores"].items())
                say(f"{paper}, {arm}, seed {seed}: {said}")
                if not quick:
                    others = [
                        one for one in read(path) if (one["paper"], one["arm"], one["seed"]) != (paper, arm, seed)
                    ]
                    runs = sorted([*others, found], key=lambda one: (one["paper"], one["arm"], one["seed"]))
                    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in runs)
                    disk.write(path, f'{{"runs": [\n{lines}\n]}}\n')


def _rounded(found: Any) -> Any:
    if isinstance(found, float):
        return round(found, 4)
    if isinstance(found, dict):
        return {name: _rounded(value) for name, value in found.items()}
    return [_rounded(value) for value in found] if isinstance(found, list) else found


def section() -> str:
    """What was measured, and where claims stand."""
    parts = [
        f"""`python benchmarks/seeing.py`: generated screens, a toy of manipulation, generated videos; three seeds.
Models have some ten thousand weights. Intervals are Student's t over seeds, of three. Data, steps and rates were set by
hand on seed 0. The cells of SAM2Act's memory begin by reading their own place, without which this
toy does not learn to recall; SAM2Long's tracker is scripted, and learns nothing. {machine("torch")}"""
    ]
    for paper, (arms, _, path) in PLAN.items():
        runs = [one for one in read(path) if one["paper"] == paper]
        if not runs:
            parts.append(f"**{paper}**: not trained yet.")
            continue
        names = list(dict.fromkeys(name for one in runs for name in one["scores"]))
        rows = []
        for arm, what in arms.items():
            of = [one["scores"] for one in runs if one["arm"] == arm]
            rows.append([f"{arm}: {what}", *(_cell([one[name] for one in of if name in one]) for name in names)])
        parts += [f"**{paper}**", table([f"arm, {len(SEEDS)} seeds", *names], rows)]
        if paper == "v2p":
            several = [one["mixture"] for one in runs if "mixture" in one]
            names = [name for name, value in several[0].items() if isinstance(value, float)] if several else []
            row = [_cell([one[name] for one in several]) for name in names]
            parts += ["**Agent S2's grounding**, share of clicks in the box", table(names, [row])] if names else []
    cards = {"v2p": v2p_card(), "agent-s2-grounding": agent_s2_grounding_card(), "sam2act": sam2act_card(),
             "sam2long": sam2long_card()}  # fmt: skip
    lines = [[name, one.says, one.outcome, one.found] for name, card in cards.items() for one in card.claims]
    return "\n\n".join([*parts, table(["paper", "claim", "at our scale", "found"], lines)])


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    low, high = mean_t(torch.tensor(values, dtype=torch.float64)) if len(values) > 1 else (values[0], values[0])
    return f"{fmean(values):.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], choices=list(PLAN))
    parser.add_argument("--no-training", action="store_true", help="write what is there")
    parser.add_argument("--quick", action="store_true", help="a few steps of each; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.no_training:
        measure(options.only, options.quick)
    if not options.quick:
        write_section(HEADING, section())


if __name__ == "__main__":
    main()
