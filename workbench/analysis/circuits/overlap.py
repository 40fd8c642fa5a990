"""`circuit_overlap`: how much of one task's circuit another uses, against chance, and what that means in function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.faithful import kept_parts, run_choices
from workbench.analysis.circuits.intervals import draws, interval
from workbench.analysis.circuits.measures import jaccard, rank_biased, weighted_jaccard
from workbench.analysis.circuits.names import head_of
from workbench.analysis.circuits.study import open_study
from workbench.errors import InterventionError
from workbench.result import Result
from workbench.session import Workbench
from workbench.tasks.base import Task

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("jaccard", "of_a", "of_b", "rank_biased", "weighted")


@dataclass(frozen=True, repr=False)
class CircuitOverlap(Result):
    """Overlap of two circuits of one model.

    Attributes:
        a, b: short descriptions. tasks: their names. unit: "heads", "nodes" or "edges".
        shared, only_a, only_b: names, in the order of the model.
        values: measures by name: "jaccard" |A∩B| / |A∪B|; "of_a", "of_b": the share of one that the other has;
            "rank_biased" of the rankings by |score|; "weighted" Σ min / Σ max of |scores| that add up to 1.
        intervals: 95 % by measure, drawing both tasks' prompts anew; NaN where a circuit kept no single scores.
        null: [draw] Jaccard overlap of random circuits that have as many items per layer as the two have.
        p_value: share of those, and the measured one, that overlap at least as much; never 0.
        stages: overlap stage by stage, where both have the same number: names and Jaccard.
        sizes: how many items are matched; curve: {"jaccard", "expected"} over them, `fraction` of all that are scored.
        cross: what is left of each task when each circuit is kept or ablated, one dict each: "do" ("keep" or "ablate"),
            "circuit", "task", "value" (share of clean minus all ablated), "interval", and "examples" [3, example]: the
            metric with the edit, clean, and with all ablated. Empty without a Workbench.
    """

    form = "workbench.circuit_overlap"

    a: str
    b: str
    tasks: tuple[str, str]
    unit: str
    shared: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    null: Tensor
    p_value: float
    stages: tuple[dict[str, Any], ...]
    sizes: tuple[int, ...]
    fractions: tuple[float, ...]
    curve: dict[str, tuple[float, ...]]
    cross: tuple[dict[str, Any], ...]
    ablation: str
    provenance: dict[str, Any]

    @property
    def expected(self) -> float:
        """Mean Jaccard overlap of the random circuits."""
        return float(self.null.mean())

    @property
    def table(self) -> pd.DataFrame:
        """One row per measure, stage and cross-faithfulness."""
        import pandas as pd

        nan = float("nan")
        rows: list[tuple[str, str, float, float, float]] = []
        for name, value in self.values.items():
            rows.append(("overlap", name, value, *self.intervals.get(name, (nan, nan))))
        low, high = torch.quantile(self.null, torch.tensor([0.025, 0.975], dtype=self.null.dtype)).tolist()
        rows.append(("chance", "jaccard", self.expected, low, high))
        rows += [("stage", stage["name"], stage["jaccard"], nan, nan) for stage in self.stages]
        for one in self.cross:
            what = f"{one['do']} {one['circuit']}'s circuit, run {one['task']}"
            rows.append(("cross-faithfulness", what, one["value"], *one["interval"]))
        return pd.DataFrame(rows, columns=["kind", "what", "value", "low", "high"])

    def __repr__(self) -> str:
        low, high = self.intervals.get("jaccard", (float("nan"),) * 2)
        total = len(self.shared) + len(self.only_a) + len(self.only_b)
        return (
            f"CircuitOverlap({self.tasks[0]} and {self.tasks[1]}: {len(self.shared)} of {total} {self.unit} shared, "
            f"Jaccard {self.values['jaccard']:.3f} [{low:.3f}, {high:.3f}], chance {self.expected:.3f}, "
            f"p {self.p_value:.2g})"
        )


def circuit_overlap(
    a: Circuit,
    b: Circuit,
    *,
    wb: Workbench | None = None,
    tasks: tuple[Task, Task] | None = None,
    unit: str | None = None,
    ablation: str = "counterfactual",
    metric: Any = "logit_diff",
    fractions: Sequence[float] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    n_null: int = 2000,
    n_bootstrap: int = 500,
    seed: int = 0,
    batch_size: int = 25,
    memory: int = 1 << 30,
    progress: bool = True,
) -> CircuitOverlap:
    """Compare two circuits of one model.

    Args:
        a, b: the circuits.
        wb, tasks: the model and the two tasks, for cross-faithfulness: keep A's circuit and run B's task, ablate A's
            and run B's, and so on, because overlap of nodes alone misleads.
        unit: what is compared: "heads", "nodes", or "edges" (of two edge circuits, the default for these).
        ablation, metric: of cross-faithfulness, as in `circuit_faithfulness`.
        fractions: of all scored items, for the curve over matched sizes.
        n_null: random circuits. n_bootstrap: of the intervals. seed: of both.

    Raises:
        InterventionError: circuits of two models, or an empty one; edges of a circuit that has none.
    """
    a.check_model(b.graph)
    a.check_not_empty()
    b.check_not_empty()
    both_edges = a.level == b.level == "edge"
    unit = ("edges" if both_edges else "heads") if unit is None else unit
    if unit not in ("heads", "nodes", "edges"):
        raise InterventionError(f'circuits are compared by "heads", "nodes" or "edges", not {unit!r}')
    if unit == "edges" and not both_edges:
        raise InterventionError("edges can be compared of two circuits of edges only", hint='unit="heads"')
    names = _items(a, unit)
    inside_a, inside_b = _members(a, unit, names), _members(b, unit, names)
    scores_a, scores_b = _scores(a, unit, names), _scores(b, unit, names)
    layers = torch.tensor([_layer(a, name) for name in names])
    null = _null(inside_a, inside_b, layers, n_null, seed)
    own = jaccard(inside_a, inside_b)
    values = _measure(inside_a, inside_b, scores_a, scores_b)
    usable = [int(f * len(names)) for f in fractions if int(f * len(names)) > 0]
    curve = [jaccard(_top(scores_a, n), _top(scores_b, n)) for n in usable]
    chance = [n / (2 * len(names) - n) for n in usable]  # of sets of n: about n²/N shared
    cross: tuple[dict[str, Any], ...] = ()
    if wb is not None and tasks is not None:
        cross = _cross(wb, (a, b), tasks, ablation, metric, seed, batch_size, memory, progress)
    elif (wb is None) != (tasks is None):
        raise InterventionError("cross-faithfulness needs wb= and tasks=, both")
    return CircuitOverlap(
        a=repr(a), b=repr(b), tasks=(a.task, b.task), unit=unit,
        shared=_named(names, inside_a & inside_b), only_a=_named(names, inside_a & ~inside_b),
        only_b=_named(names, inside_b & ~inside_a), values=values,
        intervals=_intervals(a, b, unit, names, n_bootstrap, seed), null=null,
        p_value=(1 + int((null >= own - 1e-12).sum())) / (1 + n_null), stages=_stages(a, b), sizes=tuple(usable),
        fractions=tuple(f for f in fractions if int(f * len(names)) > 0),
        curve={"jaccard": tuple(curve), "expected": tuple(chance)}, cross=cross, ablation=ablation,
        provenance={"a": a.provenance, "b": b.provenance, "n_null": n_null, "n_bootstrap": n_bootstrap, "seed": seed},
    )  # fmt: skip


def _items(circuit: Circuit, unit: str) -> tuple[str, ...]:
    graph = circuit.graph
    if unit == "edges":
        return tuple(graph.edges)
    return tuple(name for name in graph.senders if unit == "nodes" or head_of(name) is not None)


def _members(circuit: Circuit, unit: str, names: Sequence[str]) -> Tensor:
    if unit == "edges":
        return circuit.edges_in[circuit.graph.exists]
    inside = set(circuit.nodes)
    return torch.tensor([name in inside for name in names])


def _scores(circuit: Circuit, unit: str, names: Sequence[str], mean: Tensor | None = None) -> Tensor:
    """|score| of each item, 0 where it has none."""
    if unit == "edges":
        scores = circuit.edge_scores[circuit.graph.exists] if mean is None else mean
        return scores.nan_to_num(0.0).abs()
    nodes = circuit.node_scores
    index = torch.tensor([circuit.graph.sender_index[name] for name in names])
    return nodes[index].nan_to_num(0.0).abs()


def _layer(circuit: Circuit, name: str) -> int:
    """The layer of a node; of an edge one number for both ends' layers."""
    graph = circuit.graph
    if "->" not in name:
        return graph.layer_of(name)
    source, _, target = name.partition("->")
    return (graph.layer_of(source) + 1) * (len(graph.layers) + 2) + graph.layer_of(target)


def _measure(inside_a: Tensor, inside_b: Tensor, scores_a: Tensor, scores_b: Tensor) -> dict[str, float]:
    both = float((inside_a & inside_b).sum())
    return {
        "jaccard": jaccard(inside_a, inside_b),
        "of_a": both / float(inside_a.sum()), "of_b": both / float(inside_b.sum()),
        "rank_biased": rank_biased(scores_a, scores_b), "weighted": weighted_jaccard(scores_a, scores_b),
    }  # fmt: skip


def _top(scores: Tensor, n: int) -> Tensor:
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:n]] = True
    return chosen


def _null(inside_a: Tensor, inside_b: Tensor, layers: Tensor, n: int, seed: int) -> Tensor:
    """[draw] Jaccard overlap when the items of both are drawn at random within their layers.

    Within a layer of N items the number that two random sets of a and b share is hypergeometric.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    shared = np.zeros(n)
    for layer in layers.unique().tolist():
        here = layers == layer
        total, of_a, of_b = int(here.sum()), int(inside_a[here].sum()), int(inside_b[here].sum())
        if of_a and of_b:
            shared += rng.hypergeometric(of_a, total - of_a, of_b, size=n)
    union = float(inside_a.sum() + inside_b.sum()) - shared
    return torch.from_numpy(shared / union)


def _intervals(
    a: Circuit, b: Circuit, unit: str, names: Sequence[str], n: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Bootstrap over the prompts of both tasks; circuits are chosen anew in each draw."""
    if a.examples is None or b.examples is None or n == 0:
        return {}
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    several = [draws(len(one.examples), n, seed + i) for i, one in enumerate((a, b)) if one.examples is not None]
    for index_a, index_b in zip(*several, strict=True):
        inside, scores = zip(
            *(_redrawn(one, index, unit, names) for one, index in ((a, index_a), (b, index_b))), strict=True
        )
        if not bool(inside[0].any()) or not bool(inside[1].any()):
            continue
        for name, value in _measure(*inside, *scores).items():
            found[name].append(value)
    made = {}
    for name, values in found.items():
        tensor = torch.tensor(values, dtype=torch.float64)
        low, high = torch.quantile(tensor, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        made[name] = (low, high)
    return made


def _redrawn(circuit: Circuit, index: Tensor, unit: str, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Membership and |scores| when the circuit is chosen again by the same rule on other prompts."""
    assert circuit.examples is not None
    mean = circuit.examples[index].mean(0).double()
    graph = circuit.graph
    if circuit.level == "edge":
        edges = torch.full_like(circuit.edge_scores, torch.nan)
        edges[graph.exists] = mean
        size = int(circuit.threshold["value"]) if circuit.threshold.get("kind") == "top" else circuit.n_edges
        best = edges.nan_to_num(0.0).abs().flatten().argsort(descending=True, stable=True)[:size]
        chosen = torch.zeros(edges.numel(), dtype=torch.bool)
        chosen[best] = True
        inside = graph.pruned(chosen.view(edges.shape))
        if unit == "edges":
            return inside[graph.exists], mean.abs()
        nodes, members = edges.nan_to_num(0.0).abs().sum(1), inside.any(1)
    else:
        each = len(graph.senders)
        stacked = mean.view(-1, each)
        members = torch.zeros(each, dtype=torch.bool)
        sizes = [len(stage["chosen"]) for stage in circuit.stages] or [int(circuit.senders_in.sum())]
        for scores, size in zip(stacked, sizes, strict=True):
            members[scores.abs().nan_to_num(-1.0).argsort(descending=True, stable=True)[:size]] = True
        nodes = stacked.abs().nan_to_num(0.0).max(0).values
    places = torch.tensor([graph.sender_index[name] for name in names])
    return members[places], nodes[places]


def _stages(a: Circuit, b: Circuit) -> tuple[dict[str, Any], ...]:
    """Overlap of what each stage chose, as in Merullo et al. (2310.08744)."""
    if not a.stages or len(a.stages) != len(b.stages):
        return ()
    found = []
    for one, two in zip(a.stages, b.stages, strict=True):
        x, y = set(one["chosen"]), set(two["chosen"])
        found.append({"name": one["name"], "jaccard": len(x & y) / max(1, len(x | y)), "shared": tuple(sorted(x & y))})
    return tuple(found)


def _cross(
    wb: Workbench, circuits: tuple[Circuit, Circuit], tasks: tuple[Task, Task], ablation: str, metric: Any, seed: int,
    batch_size: int, memory: int, progress: bool,
) -> tuple[dict[str, Any], ...]:  # fmt: skip
    """Both circuits kept and ablated on both tasks; beside them random circuits of A's and B's layers, ablated."""
    rows: list[dict[str, Any]] = []
    for task in tasks:
        with open_study(wb, task, metric, batch_size=batch_size, memory=memory) as study:
            circuits[0].check_model(study.graph)
            study.measure_baselines()
            choices, about = [], []
            for circuit in circuits:
                kept, members = kept_parts(circuit, None)
                everything = torch.ones_like(kept) if kept.dim() == 1 else study.graph.exists
                choices += [kept, everything & ~circuit.edges_in if kept.dim() == 2 else _less(circuit, members)]
                about += [("keep", circuit.task), ("ablate", circuit.task)]
            if choices[0].dim() != choices[2].dim():
                raise InterventionError(
                    "one circuit is of nodes and the other of edges; cross-faithfulness needs two of a kind",
                    hint="find both by the same method",
                )
            empty = torch.zeros_like(choices[0])
            if empty.dim() == 1:
                empty = torch.tensor([head_of(name) is None for name in study.graph.senders])
            values = run_choices(study, torch.stack([*choices, empty]), ablation, progress)
            for (do, name), edited in zip(about, values[:-1], strict=True):
                rows.append(_share(do, name, task.name, edited, study.clean, values[-1], seed))
    return tuple(rows)


def _less(circuit: Circuit, members: Sequence[str]) -> Tensor:
    kept = torch.ones_like(circuit.senders_in)
    for name in members:
        if head_of(name) is not None:
            kept[circuit.graph.sender_index[name]] = False
    return kept


def _share(do: str, circuit: str, task: str, edited: Tensor, full: Tensor, none: Tensor, seed: int) -> dict[str, Any]:
    def share(index: Tensor) -> float:
        return float((edited[index].mean() - none[index].mean()) / (full[index].mean() - none[index].mean()))

    everything = torch.arange(len(edited))
    return {
        "do": do, "circuit": circuit, "task": task, "value": share(everything),
        "interval": interval(share, len(edited), seed=seed), "examples": torch.stack([edited, full, none]),
    }  # fmt: skip


def _named(names: Sequence[str], inside: Tensor) -> tuple[str, ...]:
    return tuple(names[i] for i in inside.nonzero()[:, 0].tolist())
