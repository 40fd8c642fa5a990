"""The study of "Circuit Component Reuse Across Tasks" (Merullo et al. 2310.08744) on a model that is at hand.

Finds the circuits of indirect object identification and Colored Objects by path patching, compares them, and steers the
attention of heads of the first where the second fails. With gpt2-medium the paper's heads are used for this, and its
figures stand beside ours; other models have other heads, found on themselves, and their figures are their own.

    python benchmarks/circuit_reuse.py --model demo-lm [--prompts 200] [--fraction 0.1] [--repair-model demo-lm-plateau]
"""

from __future__ import annotations

import argparse
from typing import Any

from shared.measuring import say, table

import workbench
from workbench.tasks import Task, colored_objects, ioi

PAPER_HEADS = ("L12H3", "L13H4", "L13H13", "L19H1")
PAPER = {
    "overlap": "0.78",
    "accuracy": "0.496",
    "together": "0.937",
    "negative mover alone": "0.781",
    "random heads": "0.499",
}


def stages(task: str) -> tuple[workbench.Stage, ...]:
    """Receivers and positions from the logits back."""
    inputs = "S2" if task == "ioi" else "queried"
    return (
        workbench.Stage("logits", "end", name="logits"),
        workbench.Stage("q", "end", name="queries of those"),
        workbench.Stage("kv", inputs, name=f"keys and values of those at {inputs}"),
    )


def study(name: str, n: int, fraction: float, seed: int) -> tuple[Any, Task, Task]:
    """The model and the tasks; their circuits and the overlap are printed."""
    model, tokenizer = workbench.models.load(name)
    wb = workbench.attach(model.eval(), tokenizer)
    tasks = (ioi(n, seed, split="held_out"), colored_objects(n, seed, split="held_out"))
    circuits = []
    for task in tasks:
        say(f"{name}: {task.name}")
        circuits.append(workbench.find_circuit(wb, task, fraction=fraction, stages=stages(task.name), progress=False))
        rows = [[stage["name"], ", ".join(_labels(stage["chosen"]))] for stage in circuits[-1].stages]
        print(f"\n{task.name} on {name}, accuracy {task.accuracy(model, tokenizer):.3f}\n")
        print(table(["stage", "heads"], rows))
        faithful = workbench.circuit_faithfulness(wb, circuits[-1], task, progress=False)
        low, high = faithful.interval
        print(f"\nfaithfulness of its {len(circuits[-1].heads)} heads {faithful.value:.3f} [{low:.3f}, {high:.3f}]")
    overlap = workbench.circuit_overlap(*circuits, wb=wb, tasks=tasks, progress=False)
    print(f"\n{overlap}\n\nshared: {', '.join(_labels(overlap.shared))}\n")
    print(
        table(list(overlap.table.columns), [[_cell(x) for x in row] for row in overlap.table.itertuples(index=False)])
    )
    return wb, *tasks


def curves(wb: Any, task: Task) -> None:
    """CPR and CMD of edge circuits."""
    for method in ("eap", "eap_ig"):
        circuit = workbench.find_circuit(wb, task, method, progress=False)
        curve = workbench.faithfulness_curve(wb, circuit, task, progress=False)
        print(f"\n{task.name} by {method}: CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}\n")
        rows = [
            [f"{f:g}", str(k), f"{v:.3f}"]
            for f, k, v in zip(curve.fractions, curve.kept_absolute, curve.absolute, strict=True)
        ]
        print(table(["fraction of edges", "edges", "faithfulness"], rows))


def steer(name: str, heads: list[str] | None, n: int, fraction: float, seed: int) -> None:
    """Accuracy on Colored Objects with the heads' attention put on the wrong colours.

    Without heads, those that hold the wrong name down in this model's own circuit of indirect object identification.
    """
    model, tokenizer = workbench.models.load(name)
    with workbench.attach(model.eval(), tokenizer) as wb:
        if heads is None:
            task = ioi(n, seed, split="held_out")
            circuit = workbench.find_circuit(wb, task, fraction=fraction, stages=stages("ioi"), progress=False)
            roles = workbench.head_roles(wb, task, circuit, progress=False)
            print(f"\nroles on {task.name} of {name}: {roles}")
            heads = _suppressing(roles, circuit)
        found = workbench.repair(wb, colored_objects(n, seed, split="held_out"), heads, progress=False)
    print(f"\nrepair of {name} with {', '.join(heads)}: {found}, newly wrong {found.broken:.3f}\n")
    print(table(list(found.table.columns), [[_cell(x) for x in row] for row in found.table.itertuples(index=False)]))


def _labels(names: Any) -> list[str]:
    return [name.replace("a", "L").replace(".h", "H") for name in names]


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-lm")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--fraction", type=float, help="of heads per stage: 0.02 as the paper, 0.1 for small models")
    parser.add_argument("--repair-model", help="the model whose Colored Objects is repaired, if it is another")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    medium = "gpt2-medium" in options.model
    small = options.model.startswith("demo-lm")
    fraction = options.fraction or (0.1 if small else 0.02)
    wb, first, second = study(options.model, options.prompts, fraction, options.seed)
    for task in (first, second):
        curves(wb, task)
    wb.detach()
    for name in dict.fromkeys((options.model, options.repair_model or ("demo-lm-plateau" if small else options.model))):
        steer(name, list(PAPER_HEADS) if medium else None, options.prompts, fraction, options.seed)
    if medium:
        print("\nThe paper's figures (GPT-2 Medium, 1000 prompts):\n")
        print(table(["quantity", "paper"], [[key, value] for key, value in PAPER.items()]))


def _suppressing(roles: Any, circuit: Any) -> list[str]:
    """Heads that hold the other name down: inhibition and negative movers, at most four, else the second stage's."""
    chosen = [*roles.of("inhibition"), *roles.of("negative mover")]
    ranked = sorted(dict.fromkeys(chosen), key=lambda head: -abs(circuit.score_of(head)))
    return ranked[:4] or _labels(circuit.stages[1]["chosen"])


if __name__ == "__main__":
    main()
