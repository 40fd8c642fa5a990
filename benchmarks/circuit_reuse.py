"""The experiment of "Circuit Component Reuse Across Tasks" (Merullo et al. 2310.08744) on a model that is at hand.

Finds the circuits of indirect object identification and Colored Objects by path patching, compares them, and steers the
attention of heads of the first where the second fails. With gpt2-medium the paper's heads are used for this; other
models have other heads, found on themselves, and their figures are their own. The paper's figures (GPT-2 Medium, 1000
prompts) stand beside those measured here.

    python benchmarks/circuit_reuse.py --model demo-lm [--prompts 200] [--fraction 0.1] [--repair-model demo-lm-plateau]
"""

from __future__ import annotations

import argparse
from typing import Any

from shared.measuring import say, table

import workbench
from workbench.tasks import Task, colored_objects, ioi

PAPER_INHIBITION, PAPER_NEGATIVE = ("L12H3", "L13H4", "L13H13"), ("L19H1",)
PAPER_MOVERS = ("L15H14", "L16H15", "L17H4", "L18H5", "L19H15")
PAPER = {
    "overlap of the circuits' heads": "25/32 = 0.781",
    "accuracy": "0.496",
    "all steered heads": "0.937",
    "negative movers alone": "0.781",
    "inhibition heads alone": "0.815",
    "random heads": "0.499 ± 0.010",
    "right answers broken": "0",
    "movers, to the right colour": "+0.027",
    "movers, to the wrong colours": "−0.087",
}


def stages(task: str, before: str) -> tuple[workbench.Stage, ...]:
    """Receivers and positions from the logits back; `before` as in `Stage`."""
    inputs = "S2" if task == "ioi" else "queried"
    return (
        workbench.Stage("logits", "end", name="logits", before=before),
        workbench.Stage("q", "end", name="queries of those", before=before),
        workbench.Stage("kv", inputs, name=f"keys and values of those at {inputs}", before=before),
    )


def experiment(name: str, n: int, fraction: float, before: str, seed: int) -> tuple[Any, Task, Task, float]:
    """The model, the tasks, and the overlap of their circuits, which are printed."""
    model, tokenizer = workbench.models.load(name)
    wb = workbench.attach(model.eval(), tokenizer)
    tasks = (ioi(n, seed, split="held_out"), colored_objects(n, seed, split="held_out"))
    circuits = []
    for task in tasks:
        say(f"{name}: {task.name}")
        chain = stages(task.name, before)
        circuits.append(workbench.find_circuit(wb, task, fraction=fraction, stages=chain, progress=False))
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
    return wb, *tasks, overlap.values["jaccard"]


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


def steer(name: str, medium: bool, n: int, fraction: float, before: str, seed: int) -> dict[str, str]:
    """Accuracy on Colored Objects with the attention of heads put on the wrong colours, as in `PAPER`.

    The heads are the paper's, or those that hold the wrong name down in this model's own circuit of indirect object
    identification.
    """
    model, tokenizer = workbench.models.load(name)
    with workbench.attach(model.eval(), tokenizer) as wb:
        groups = {"inhibition heads alone": PAPER_INHIBITION, "negative movers alone": PAPER_NEGATIVE}
        movers: tuple[str, ...] = PAPER_MOVERS
        if not medium:
            task = ioi(n, seed, split="held_out")
            chain = stages("ioi", before)
            circuit = workbench.find_circuit(wb, task, fraction=fraction, stages=chain, progress=False)
            roles = workbench.head_roles(wb, task, circuit, progress=False)
            print(f"\nroles on {task.name} of {name}: {roles}")
            groups = _suppressing(roles, circuit)
            movers = roles.of("mover")
        heads = list(dict.fromkeys(head for group in groups.values() for head in group))
        looking = [head for head in movers if head not in heads]
        colours = colored_objects(n, seed, split="held_out")
        found = workbench.repair(wb, colours, heads, movers=looking, progress=False)
        alone = {
            what: workbench.repair(wb, colours, group, n_random=0, progress=False)
            for what, group in groups.items()
            if group and set(group) != set(heads)
        }
    print(f"\nrepair of {name} with {', '.join(heads)}: {found}\n")
    print(table(list(found.table.columns), [[_cell(x) for x in row] for row in found.table.itertuples(index=False)]))
    made = {
        "accuracy": f"{float(found.before.mean()):.3f}", "all steered heads": f"{float(found.together.mean()):.3f}",
        "random heads": f"{float(found.random.mean()):.3f} ± {float(found.random.mean(1).std()):.3f}",
        "right answers broken": f"{found.broken:.3f}",
    }  # fmt: skip
    made |= {what: f"{float(one.together.mean()):.3f}" for what, one in alone.items()}
    if looking:
        shift = (found.attention_after - found.attention_before).mean((0, 2)).tolist()
        made |= {"movers, to the right colour": f"{shift[0]:+.3f}", "movers, to the wrong colours": f"{shift[1]:+.3f}"}
    return made


def _labels(names: Any) -> list[str]:
    return [name.replace("a", "L").replace(".h", "H") for name in names]


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the experiment and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-lm")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--fraction", type=float, help="of heads per stage: 0.02 as the paper, 0.1 for small models")
    parser.add_argument("--repair-model", help="the model whose Colored Objects is repaired, if it is another")
    parser.add_argument("--before", choices=("any", "all"), help="see Stage; all as the paper, any for small models")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    medium = "gpt2-medium" in options.model
    small = options.model.startswith("demo-lm")
    fraction = options.fraction or (0.1 if small else 0.02)
    before = options.before or ("any" if small else "all")
    wb, first, second, overlap = experiment(options.model, options.prompts, fraction, before, options.seed)
    for task in (first, second):
        curves(wb, task)
    wb.detach()
    for name in dict.fromkeys((options.model, options.repair_model or ("demo-lm-plateau" if small else options.model))):
        ours = steer(name, medium, options.prompts, fraction, before, options.seed)
        ours |= {"overlap of the circuits' heads": f"{overlap:.3f}"} if name == options.model else {}
        rows = [[what, value, ours.get(what, "–")] for what, value in PAPER.items()]
        print(f"\n{table(['quantity', 'paper, GPT-2 Medium', f'here, {name}'], rows)}")


def _suppressing(roles: Any, circuit: Any) -> dict[str, tuple[str, ...]]:
    """Heads that hold the other name down, at most four, else those that the second stage found."""
    found: dict[str, tuple[str, ...]] = {}
    for what, role in (("inhibition heads alone", "inhibition"), ("negative movers alone", "negative mover")):
        ranked = sorted(roles.of(role), key=lambda head: -abs(circuit.score_of(head)))
        found[what] = tuple(ranked[: 4 - sum(map(len, found.values()))])
    if not any(found.values()):
        return {"heads of the second stage": tuple(_labels(circuit.stages[1]["chosen"]))}
    return found


if __name__ == "__main__":
    main()
