"""The maze transformer's modes: shortest plans and trace lengths, beside models taught otherwise, and their circuits.

Writes `results.json` beside the shipped weights, which its card and the gallery read. Models that are not in the folder
are left out; `python -m workbench.mechanisms.dualformer.training --kind KIND --folder FOLDER` trains "dual", "full" and
"solution".

    python benchmarks/dualformer.py --folder FOLDER [--mazes 500] [--prompts 32] [--modes-only]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from shared.measuring import say, table

import workbench
from workbench.analysis.statistics.intervals import mean_t
from workbench.mechanisms.dualformer import load, study, think
from workbench.mechanisms.dualformer.card import RESULTS
from workbench.mechanisms.dualformer.model import Thought
from workbench.mechanisms.dualformer.training import held_out
from workbench.storage.json_text import finite

RUNS = {
    "dual, fast": ("dual", "fast"), "dual, slow": ("dual", "slow"), "dual, auto": ("dual", "auto"),
    "whole traces": ("full", "slow"), "plans alone": ("solution", "fast"),
}  # fmt: skip
GAPS = {
    "slow minus whole traces": ("dual, slow", "whole traces"),
    "fast minus plans alone": ("dual, fast", "plans alone"),
    "auto minus fast": ("dual, auto", "dual, fast"),
    "auto minus slow": ("dual, auto", "dual, slow"),
}


def gap(a: list[Thought], b: list[Thought], what: str) -> list[float]:
    """The mean difference of two runs on the same mazes, and its 95 % t interval."""
    values = torch.tensor([float(getattr(x, what)) - float(getattr(y, what)) for x, y in zip(a, b, strict=True)])
    return [float(values.mean()), *mean_t(values.double())]


def modes(folder: Path, n: int) -> dict[str, Any]:
    """Scores of each mode, and paired differences."""
    mazes, runs = held_out(n, seed=1), {}
    there = {name: run for name, run in RUNS.items() if (folder / f"{run[0]}.safetensors").is_file()}
    for name, (kind, mode) in there.items():
        say(name)
        runs[name] = think(load(folder / f"{kind}.safetensors"), mazes, mode)
    gaps = {}
    for name, (a, b) in GAPS.items():
        if not {a, b} <= set(runs):
            continue
        gaps[f"optimal, {name}"] = gap(runs[a], runs[b], "optimal")
        gaps[f"trace, {name}"] = gap(runs[a], runs[b], "n_trace")
    return {"modes": {name: study.to_json(study.scores(run)) for name, run in runs.items()}, "differences": gaps}


def circuits(folder: Path, n: int) -> dict[str, Any]:
    """The circuits of a plan's first step in both modes, and of the mode itself: heads, overlap, cross-faithfulness."""
    tasks = {mode: study.step_task(mode, n) for mode in ("fast", "slow")} | {"mode": study.mode_task(n)}
    found: dict[str, Any] = {"tasks": {}, "heads": {}, "overlap": {}}
    with workbench.attach(load(folder / "dual.safetensors")) as wb:
        several = {}
        for name, task in tasks.items():
            say(f"circuit of {name}")
            several[name] = workbench.find_circuit(wb, task, "eap_ig", n_edges=0.1, progress=False)
            faithful = workbench.circuit_faithfulness(wb, several[name], task, progress=False)
            found["tasks"][name] = {
                "accuracy": task.accuracy(wb.model, None), "clean": float(several[name].clean.mean()),
                "corrupted": float(several[name].corrupted.mean()), "edges": several[name].n_edges,
                "of": several[name].graph.n_edges, "heads": list(several[name].heads),
                "faithfulness": [faithful.value, *faithful.interval],
            }  # fmt: skip
            ablated = workbench.ablate_heads(wb, task, "counterfactual", progress=False)
            found["heads"][name] = dict(zip(ablated.heads, (-ablated.effects[:, 0].mean(-1)).tolist(), strict=True))
        for one, other in (("fast", "slow"), ("fast", "mode"), ("slow", "mode")):
            say(f"overlap of {one} and {other}")
            both = (tasks[one], tasks[other])
            shared = workbench.circuit_overlap(several[one], several[other], wb=wb, tasks=both, progress=False)
            found["overlap"][f"{one} and {other}"] = {
                "jaccard": [shared.values["jaccard"], *shared.intervals.get("jaccard", (float("nan"),) * 2)],
                "expected": shared.expected, "p": shared.p_value, "p_beyond_nodes": shared.p_beyond_nodes,
                "shared": len(shared.shared), "either": len(shared.shared + shared.only_a + shared.only_b),
                "shared_heads": sorted(set(several[one].heads) & set(several[other].heads)),
                "cross_faithfulness": [
                    {key: row[key] for key in ("do", "circuit", "task", "random", "value", "defined")}
                    | {"interval": list(row["interval"])}
                    for row in shared.cross_faithfulness
                ],
            }  # fmt: skip
        say("where the mode is held")
        patched = workbench.patch_layers(wb, tasks["mode"], positions=[1, 2], progress=False)
        rows = patched.table[["row", "position", "score", "low", "high"]].to_dict("records")
        found["mode_patching"] = [row for row in rows if str(row["row"]).startswith("decoder")]
    return found


def training(folder: Path) -> dict[str, Any]:
    """How each model was trained."""
    kinds = [kind for kind in ("dual", "full", "solution") if (folder / f"{kind}.safetensors").is_file()]
    told = {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in kinds}
    return {
        kind: {"seconds": round(each["seconds"]), "losses": each["losses"], **each["settings"]}
        for kind, each in told.items()
    }


def main() -> None:
    """Measure everything, print the table, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--mazes", type=int, default=500)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--modes-only", action="store_true", help="keep the circuits that were found before")
    given = parser.parse_args()
    before = json.loads(RESULTS.read_text()) if given.modes_only else {}
    found = {"training": training(given.folder), **modes(given.folder, given.mazes)}
    RESULTS.write_text(json.dumps(finite(found), indent=1) + "\n")  # the circuits take longer
    rows = [
        [name, *("{:.1%} [{:.1%}, {:.1%}]".format(*one[key]) for key in ("optimal", "solved")),
         "{:.1f} [{:.1f}, {:.1f}]".format(*one["n_trace"]), f"{one['fast']:.0%}"]
        for name, one in found["modes"].items()
    ]  # fmt: skip
    print(table(["taught, mode", "shortest plans", "solved", "tokens of the trace", "without trace"], rows))
    found["circuits"] = before["circuits"] if given.modes_only else circuits(given.folder, given.prompts)
    RESULTS.write_text(json.dumps(finite(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
