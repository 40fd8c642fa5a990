"""Cross-faithfulness: what is left of each task when another task's circuit is kept or ablated, beside random ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.engine.setup import open_setup
from workbench.analysis.circuits.faithfulness import kept_and_members, run_choices
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.names import head_of
from workbench.analysis.circuits.shares import Denominator
from workbench.errors import InterventionError
from workbench.session.workbench import Workbench
from workbench.tasks.base import Task


def cross_faithfulness(
    wb: Workbench,
    circuits: Sequence[Circuit],
    tasks: Sequence[Task],
    *,
    ablation: str,
    metric: Any,
    n_random: int,
    seed: int,
    batch_size: int,
    memory: int,
    progress: bool,
) -> tuple[dict[str, Any], ...]:
    """Keep and ablate each circuit on each task, and random circuits that have as much in every layer.

    Returns:
        One dict for each, as `CircuitOverlap.cross_faithfulness` has them. Of random circuits the value is the mean
        over the draws, and the interval goes from the lowest to the highest.

    Raises:
        InterventionError: a circuit of another model, or one of nodes beside one of edges.
    """
    if len({kept_and_members(circuit, None)[0].dim() for circuit in circuits}) > 1:
        raise InterventionError(
            "one circuit is of nodes and the other of edges; cross-faithfulness needs two of a kind",
            hint="find both by the same method",
        )
    rows: list[dict[str, Any]] = []
    for task in tasks:
        with open_setup(wb, task, metric, batch_size=batch_size, memory=memory, seed=seed) as setup:
            circuits[0].check_model(setup.graph)
            setup.measure_baselines()
            choices, about = [], []
            for number, circuit in enumerate(circuits):
                several = [circuit, *random_like(circuit, n_random, seed + number)]
                choices += [_choice(one, do) for do in ("keep", "ablate") for one in several]
                about += [(do, circuit.task, len(several)) for do in ("keep", "ablate")]
            values = run_choices(setup, torch.stack([*choices, _nothing(circuits[0])]), ablation, progress)
            whole = Denominator.of(setup.clean, values[-1], setup.metric.sign)
            whole.warn(f"the cross-faithfulness of {setup.metric.name} on {task.name}", stacklevel=4)
            none, at = values[-1], 0
            for do, name, n in about:
                for random, edited in ((False, values[at : at + 1]), (True, values[at + 1 : at + n])):
                    if len(edited):
                        about_it = {"do": do, "circuit": name, "random": random, "task": task.name}
                        rows.append(about_it | _left(edited, setup.clean, none, random, whole))
                at += n
    return tuple(rows)


def _choice(circuit: Circuit, do: str) -> Tensor:
    """What stays when a circuit is kept or ablated: [sender] or [sender, receiver] bool."""
    kept, members = kept_and_members(circuit, None)
    if do == "keep":
        return kept
    if kept.dim() == 2:
        return circuit.graph.exists & ~circuit.edges_in
    made = torch.ones_like(kept)
    for name in members:
        if head_of(name) is not None:
            made[circuit.graph.sender_index[name]] = False
    return made


def _nothing(circuit: Circuit) -> Tensor:
    if kept_and_members(circuit, None)[0].dim() == 2:
        return torch.zeros_like(circuit.edges_in)
    return torch.tensor([head_of(name) is None for name in circuit.graph.senders])


def random_like(circuit: Circuit, n: int, seed: int) -> list[Circuit]:
    """Circuits of as many heads in every layer, or as many edges between every two layers, drawn at random."""
    generator, graph = torch.Generator().manual_seed(seed), circuit.graph
    made = []
    for _ in range(n):
        if circuit.level == "edge":
            edges = torch.zeros_like(circuit.edges_in)
            edges[graph.exists] = _drawn(circuit.edges_in[graph.exists], _edge_layers(graph), generator)
            made.append(circuit.with_edges(edges))
        else:
            heads = torch.tensor([graph.sender_index[name] for name in graph.head_names])
            layers = torch.tensor([graph.layer_of(name) for name in graph.head_names])
            chosen = circuit.senders_in.clone()
            chosen[heads] = _drawn(circuit.senders_in[heads], layers, generator)
            made.append(circuit.with_nodes([graph.senders[i] for i in chosen.nonzero()[:, 0].tolist()]))
    return made


def _drawn(inside: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """[item] bool: in each group as many as are inside, others at random."""
    made = torch.zeros_like(inside)
    for group in groups[inside].unique().tolist():
        items = (groups == group).nonzero()[:, 0]
        order = torch.randperm(len(items), generator=generator)
        made[items[order[: int(inside[items].sum())]]] = True
    return made


def _edge_layers(graph: Graph) -> Tensor:
    """[edge] one number for both ends' layers."""
    sending, receiving = (
        torch.tensor([graph.layer_of(n) for n in names]) for names in (graph.senders, graph.receivers)
    )
    return ((sending[:, None] + 1) * (len(graph.layers) + 2) + receiving)[graph.exists]


def _left(edited: Tensor, full: Tensor, none: Tensor, random: bool, whole: Denominator) -> dict[str, Any]:
    """What is left of the metric with [draw, example] edits; of the circuit itself the interval is over prompts."""
    shares = ((edited.mean(1) - none.mean()) / whole.value).tolist()
    ends = (min(shares), max(shares)) if random else whole.interval(edited[0] - none, full, none)
    examples = torch.stack([edited.mean(0), full, none])
    return {"value": sum(shares) / len(shares), "interval": ends, "examples": examples, "defined": whole.defined}
