"""The analyses that an investigation may run, each with what it found in numbers and in sentences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.cross_faithfulness import random_like
from workbench.analysis.circuits.faithfulness import Faithfulness, circuit_faithfulness
from workbench.analysis.circuits.find import find_circuit
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.names import label
from workbench.analysis.circuits.overlap import circuit_overlap
from workbench.analysis.circuits.repair import repair
from workbench.analysis.circuits.roles import head_roles
from workbench.analysis.importance import head_importance
from workbench.analysis.statistics.intervals import bracketed, mean_t, means_t, proportions
from workbench.errors import WorkbenchError
from workbench.inputs import decoder_start, device_for_inputs
from workbench.investigator.naming import listed, rounded, said_of_roles
from workbench.investigator.subject import Found, Subject
from workbench.metrics import METRICS
from workbench.session.workbench import Workbench
from workbench.storage.result import Result
from workbench.tasks.base import Task

T = TypeVar("T")
RELEVANT = 0.05
"""Share of prompts minus twins from which on a head counts, if that is also sure; effects can be sure and tiny."""
NATS = 0.1
"""Prompts minus twins, in the mean, from which on a model tells them apart; noise can be sure too."""
KEPT = 0.5
"""What a confirmed circuit keeps at least of the task, by the lower end of its interval."""
_CONTROLS = 5
_LEVEL = 0.05


def baseline(subject: Subject) -> Found:
    """Whether the model does the task: the logit difference of prompts and twins, and how often it is right."""
    wb, task = subject.wb, subject.task
    with torch.no_grad():
        clean = task.logit_diff(wb.model, wb.tokenizer, subject.batch_size).double()
        twin = task.logit_diff(wb.model, wb.tokenizer, subject.batch_size, twins=True).double()
        right = _right(subject)
    with suppress(WorkbenchError):  # what needs the graph will say why there is none
        _ = subject.graph
    apart = clean - twin
    low, high = mean_t(apart, checked=False)  # what is decided needs ends; what is said has none where few carry it
    least, most = mean_t(clean, checked=False)
    share = float(right.mean())
    does = low > 0 and least > 0 and float(apart.mean()) >= NATS
    sure = does or high < NATS or most <= 0
    at, to = proportions(right).tolist()
    numbers: dict[str, Any] = {
        "does": does, "sure": sure, "clean": float(clean.mean()), "corrupted": float(twin.mean()),
        "difference": [low, high], "accuracy": share, "prompts": len(task),
    }  # fmt: skip
    says = (
        f"On {len(task)} prompts the right answer is ahead by {rounded(numbers['clean'])} nats, on their twins by "
        f"{rounded(numbers['corrupted'])}; prompts minus twins {rounded(float(apart.mean()))} "
        f"{_within(*mean_t(apart))}.",
        f"The most likely next token is right on {share:.0%} [{at:.0%}, {to:.0%}] of the prompts.",
        "So the model tells the prompts from their twins." if does else
        f"So the model does not tell the prompts from their twins by {NATS:g} nats or more." if sure else
        f"So it is not sure whether the model tells the prompts from their twins by {NATS:g} nats or more.",
    )  # fmt: skip
    return Found(numbers, says)


def _within(low: float, high: float) -> str:
    return bracketed(low, high).replace("-", "−")


def _right(subject: Subject) -> Tensor:
    """[example] 1 where the most likely next token is right."""
    wb = subject.wb
    return torch.cat([METRICS["accuracy"](wb.model(**batch), batch) for batch in _batches(wb, subject.task, subject)])


def _batches(wb: Workbench, task: Task, subject: Subject, *, twins: bool = False) -> list[Any]:
    device, start = device_for_inputs(wb.model), decoder_start(wb.model)
    return list(task.batches(wb.tokenizer, subject.batch_size, device=device, start_token=start, twins=twins))


def all_heads(subject: Subject) -> Found:
    """All heads' outputs taken from the twin at once, on the half that confirms."""
    graph = subject.graph
    heads = _all_of(graph, subject.task.name)
    found = _quietly(lambda: circuit_faithfulness(
        subject.wb, heads, subject.tested_with, keep_mlps=True, batch_size=subject.batch_size, progress=False,
    ))  # fmt: skip
    carried = found.full - found.none
    low, high = mean_t(carried, checked=False)
    share = float(carried.mean()) / max(subject.scale, 1e-12)
    carry = found.denominator.defined and share > RELEVANT
    sure = carry or high <= RELEVANT * subject.scale
    numbers = {"carry": carry, "sure": sure, "share": share, "lost": [low, high], "heads": len(graph.head_names)}
    says = (
        f"With the output of all {len(graph.head_names)} heads taken from the twin the logit difference falls by "
        f"{rounded(float(carried.mean()))} {_within(*mean_t(carried))}, {share:.0%} of prompts minus twins.",
        "So heads carry the difference." if carry else
        "So no head carries it: the answer comes by another way." if sure else
        "So it is not sure whether heads carry it.",
    )  # fmt: skip
    return Found(numbers, says, {"faithfulness": found})


def _all_of(graph: Graph, task: str) -> Circuit:
    """Every head of the model as a circuit without scores."""
    n, m = len(graph.senders), len(graph.receivers)
    nothing = torch.zeros(0, dtype=torch.float64)
    blank = Circuit(
        model=graph.facts, task=task, method="given", metric="logit_diff", direction="", sign="", level="node",
        senders_in=torch.zeros(n, dtype=torch.bool), edges_in=torch.zeros(n, m, dtype=torch.bool),
        node_scores=torch.full((n,), torch.nan, dtype=torch.float64),
        edge_scores=torch.full((n, m), torch.nan, dtype=torch.float64), threshold={"kind": "given", "value": None},
        stages=(), examples=None, clean=nothing, corrupted=nothing, settings={}, provenance={},
    )  # fmt: skip
    return blank.with_nodes(graph.head_names)


def importance(subject: Subject, how: str = "mean") -> Found:
    """Which heads the task needs, each ablated alone, on the half that finds."""
    wb, task = subject.wb, subject.found_with
    batches = _batches(wb, task, subject)
    n = sum(site.n_heads or 0 for site in wb.sites) or 1
    found = head_importance(
        wb, batches, "logit_diff", how, level=1 - _LEVEL / n, seed=subject.seed, progress=False,
        reference=[*batches, *_batches(wb, task, subject, twins=True)],
    )  # fmt: skip
    score, ends = found.score(), means_t(found.examples(), found.level, checked=False)
    helps = [i for i in range(len(score)) if float(ends[i, 0]) > 0 and float(score[i]) >= RELEVANT * subject.scale]
    hurts = [i for i in range(len(score)) if float(ends[i, 1]) < 0 and -float(score[i]) >= RELEVANT * subject.scale]
    helps.sort(key=lambda i: -float(score[i]))
    hurts.sort(key=lambda i: float(score[i]))
    shares = {found.heads[i]: float(score[i]) / subject.scale for i in (*helps, *hurts)}
    numbers = {"heads": [found.heads[i] for i in helps], "against": [found.heads[i] for i in hurts], "shares": shares}
    listed = ", ".join(f"{name} ({shares[name]:.0%})" for name in numbers["heads"])
    against = ", ".join(f"{name} ({shares[name]:.0%})" for name in numbers["against"])
    one = f"Of {len(found.heads)} heads, each with its output replaced ({how}), the task needs {listed or 'none'}"
    says = [f"{one}; shares are of prompts minus twins, at 95 % over all heads together."]
    says += [f"Without {against} it does better."] if against else []
    return Found(numbers, tuple(says), {"importance": found})


def circuit(subject: Subject, method: str = "eap_ig", threshold: float = 0.03) -> Found:
    """The edges that carry at least a share of the difference, on the half that finds."""
    options: dict[str, Any] = {"batch_size": subject.batch_size, "progress": False}
    if method == "acdc":
        found = _quietly(lambda: find_circuit(
            subject.wb, subject.found_with, method, threshold=threshold, **options
        ))  # fmt: skip
    else:
        scored = _quietly(lambda: find_circuit(subject.wb, subject.found_with, method, **options))
        found = scored.above(threshold * subject.scale)
    return Found(_circuit_numbers(found, threshold), (_circuit_said(found, threshold),), {"circuit": found})


def _circuit_numbers(found: Circuit, threshold: float) -> dict[str, Any]:
    nodes, edges = list(found.nodes), list(found.edges)
    return {"heads": list(found.heads), "nodes": nodes[:60], "edges": edges[:60], "n_edges": found.n_edges,
            "threshold": threshold}  # fmt: skip


def _circuit_said(found: Circuit, threshold: float) -> str:
    heads = listed(found.heads, ", ") or "no heads"
    by = {"acdc": "cut one by one", "eap_ig": "scored by integrated gradients", "eap": "scored by gradients"}
    return (
        f"Edges that carry at least {threshold:.2%} of the difference, {by[found.method]}: {found.n_edges} of "
        f"{found.graph.n_edges}, through {heads}."
    )


def faithfulness(subject: Subject) -> Found:
    """The newest circuit alone, on the half that confirms, beside random circuits of its size."""
    latest = _latest(subject)

    def kept(one: Circuit) -> Faithfulness:
        return _quietly(lambda: circuit_faithfulness(
            subject.wb, one, subject.tested_with, batch_size=subject.batch_size, progress=False,
        ))  # fmt: skip

    found = kept(latest)
    drawn = [one for one in random_like(latest, 4 * _CONTROLS, subject.seed) if not _same(one, latest)][:_CONTROLS]
    controls = [kept(one) for one in drawn]
    low, high = found.interval
    best = max((one.value for one in controls), default=0.0)
    confirmed = found.denominator.defined and low > KEPT and found.value > best and bool(latest.heads)
    numbers = {
        "confirmed": confirmed, "value": found.value, "interval": [low, high],
        "random": [one.value for one in controls], "heads": list(latest.heads), "n_edges": latest.n_edges,
    }  # fmt: skip
    chance = f"{len(controls)} random circuits with as many edges between the same layers keep at most {best:.0%}"
    chance = chance if controls else "no other circuit of its size is there to compare with"
    says = (
        f"On the other half of the prompts the circuit alone keeps {found.value:.0%} "
        f"{bracketed(low, high, '.0%')} of the difference; {chance}.",
        "So it is confirmed." if confirmed else "So it is not confirmed.",
    )
    results: dict[str, Result] = {"faithfulness": found}
    return Found(numbers, says, results | {f"random {i}": one for i, one in enumerate(controls, 1)})


def minimality(subject: Subject, threshold: float = 0.02) -> Found:
    """The newest circuit without the nodes that it does not need, on the half that finds."""
    latest = _latest(subject)
    found = _quietly(lambda: circuit_faithfulness(
        subject.wb, latest, subject.found_with, minimality=True, batch_size=subject.batch_size, progress=False,
    ))  # fmt: skip
    falls = found.minimality
    dropped = [node for node, fall in falls.items() if fall == fall and fall < threshold]
    smaller = _without(latest, dropped)
    numbers: dict[str, Any] = {
        "dropped": dropped, "heads": list(smaller.heads), "n_edges": smaller.n_edges, "falls": falls,
    }  # fmt: skip
    results: dict[str, Result] = {"faithfulness": found}
    if dropped and smaller.n_edges:
        results["circuit"] = smaller
    else:
        numbers["dropped"] = []
    needed = [f"{label(node)} ({falls[node]:.0%})" for node in sorted(set(falls) - set(dropped), key=_largest(falls))]
    says = (
        f"Of the {len(falls)} nodes of the circuit {len(dropped)} can be left out at a loss below {threshold:.0%} each"
        f"{': ' + listed([label(node) for node in dropped], ', ') if dropped else ''}.",
        f"It needs {', '.join(needed) or 'none'}.",
    )
    return Found(numbers, says, results)


def _largest(falls: Mapping[str, float]) -> Callable[[str], tuple[float, str]]:
    """Order of nodes: the largest fall first, those without a number last."""
    return lambda node: (-falls[node] if falls[node] == falls[node] else 0.0, node)


def roles(subject: Subject) -> Found:
    """What the standing circuit's heads look at and write, on all prompts."""
    standing = subject.standing
    found = head_roles(
        subject.wb, subject.task, standing, places=subject.places, batch_size=subject.batch_size, progress=False
    )
    named = {head: list(several) for head, several in zip(found.heads, found.roles, strict=True)}
    says = said_of_roles(named) or ("The circuit has no heads to name.",)
    return Found({"roles": named}, says, {"roles": found})


def overlap(subject: Subject, **arguments: str) -> Found:
    """How much of the standing circuit another task's circuit shares.

    Raises:
        WorkbenchError: no such task is known.
    """
    name = arguments.get("with", "")
    standing, other = subject.standing, subject.remembered.get(name)
    if other is None:
        if name not in subject.known:
            raise WorkbenchError(f"no task {name!r} is known", hint=f"known: {', '.join(subject.known) or 'none'}")
        method = "eap_ig" if standing.method == "acdc" else standing.method
        scored = _quietly(lambda: find_circuit(
            subject.wb, subject.known[name], method, batch_size=subject.batch_size, progress=False,
        ))  # fmt: skip
        other = scored.top(max(1, min(standing.n_edges, scored.graph.n_edges)))
    found = _quietly(lambda: circuit_overlap(standing, other, n_null=500, n_bootstrap=100, seed=subject.seed))
    value = found.values["jaccard"]
    numbers = {"with": name, "shared": list(found.shared)[:60], "jaccard": value, "expected": found.expected,
               "p": found.p_value}  # fmt: skip
    many = len(found.shared) + len(found.only_a) + len(found.only_b)
    says = (
        f"It shares {len(found.shared)} of {many} {found.unit} with that of {name}: overlap {value:.2f}, with heads "
        f"renamed at random {found.expected:.2f}, p {found.p_value:.2g}.",
    )
    return Found(numbers, says, {"overlap": found, "circuit of the other": other})


def repair_heads(subject: Subject) -> Found:
    """Turn the heads that answer towards the right answer, on all prompts.

    Raises:
        WorkbenchError: it is not known where the answer stands.
    """
    towards = subject.places.get("answer", ())
    if not towards:
        raise WorkbenchError("it is not known where the answer stands", hint='investigate(places={"answer": (name,)})')
    standing = subject.standing
    movers = subject.roles.of("mover") if subject.roles is not None else ()
    heads = movers or standing.heads
    found = repair(
        subject.wb, subject.task, heads, towards=towards, n_random=0, batch_size=subject.batch_size, progress=False
    )
    before, after = float(found.before.mean()), float(found.together.mean())
    gain = found.together - found.before
    low, high = mean_t(gain)
    numbers = {
        "before": before,
        "after": after,
        "gain": [low, high],
        "broken": found.broken,
        "heads": list(found.heads),
    }
    says = (
        f"With {listed(found.heads)} turned to the right answer accuracy goes from {before:.0%} to {after:.0%}, a "
        f"gain of {float(gain.mean()):+.0%} {bracketed(low, high, '+.0%')}.",
    )
    return Found(numbers, says, {"repair": found})


RUNS: dict[str, Callable[..., Found]] = {
    "all_heads": all_heads, "importance": importance, "circuit": circuit, "faithfulness": faithfulness,
    "minimality": minimality, "roles": roles, "overlap": overlap, "repair": repair_heads,
}  # fmt: skip


def _latest(subject: Subject) -> Circuit:
    if not subject.circuits:
        raise WorkbenchError("there is no circuit yet", hint='plan "circuit" first')
    return subject.circuits[-1]


def _without(one: Circuit, nodes: Sequence[str]) -> Circuit:
    """A circuit of edges without those of some nodes."""
    graph, edges = one.graph, one.edges_in.clone()
    for node in nodes:
        edges[graph.sender_index[node]] = False
        for name, column in graph.receiver_index.items():
            if name.partition("<")[0] == node:
                edges[:, column] = False
    return one.with_edges(graph.pruned(edges))


def _same(one: Circuit, other: Circuit) -> bool:
    return torch.equal(one.edges_in, other.edges_in) and torch.equal(one.senders_in, other.senders_in)


def _quietly(run: Callable[[], T]) -> T:
    """Run what says in a warning that shares are undefined; the numbers say so too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return run()
