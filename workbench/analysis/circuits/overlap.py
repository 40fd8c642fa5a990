"""`circuit_overlap`: how much of one task's circuit another uses, against chance, and what that means in function."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.cross_faithfulness import cross_faithfulness
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.names import head_of
from workbench.analysis.circuits.overlap_null import FEW_RENAMINGS, Renamings, beyond_degrees
from workbench.analysis.circuits.overlap_result import CircuitOverlap
from workbench.analysis.statistics.intervals import drawn_t, draws, middle
from workbench.analysis.statistics.overlap import jaccard, rank_biased, top_weights, weighted_jaccard
from workbench.analysis.statistics.p_values import among_draws
from workbench.errors import InterventionError, expect
from workbench.session.workbench import Workbench
from workbench.tasks.base import Task

MEASURES = ("jaccard", "of_a", "of_b", "rank_biased", "weighted")


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
    n_random: int = 3,
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
        n_null: renamings, and random circuits of given degrees, that overlap is compared with. n_random: random
            circuits that are kept and ablated beside each circuit, for cross-faithfulness. n_bootstrap: of the
            intervals. seed: of all.

    Raises:
        InterventionError: circuits of two models, an empty one, or one that has none of what is compared.

    Warns:
        UserWarning: the model has so few heads that hardly any renaming differs.
    """
    expect(Circuit, a=a, b=b)
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
    for circuit, inside in ((a, inside_a), (b, inside_b)):
        if not bool(inside.any()):
            raise InterventionError(
                f"{circuit!r} has no {unit} to compare", hint='unit="nodes" or "edges", or a larger circuit'
            )
    renamings = Renamings.draw(a.graph, n_null, seed)
    if renamings.n_different < FEW_RENAMINGS:
        warnings.warn(
            f"the model's heads can be renamed within their layers in only {renamings.n_different:.0f} ways, so that "
            "no p-value can be small",
            UserWarning,
            stacklevel=2,
        )
    values = _measure(inside_a, inside_b, scores_a.nan_to_num(0.0), scores_b.nan_to_num(0.0))
    usable = _sizes(scores_a, scores_b, fractions)
    chance = _by_chance(a.graph, unit, names, renamings, (inside_a, inside_b), (scores_a, scores_b), usable)
    by_scores = all(circuit.threshold.get("kind") not in ("given", "file") for circuit in (a, b))
    weighted = unit != "edges" and by_scores and values["weighted"] > 0
    statistic = "weighted" if weighted else "jaccard"
    beyond = beyond_degrees(a.edges_in, b.edges_in, a.graph, n_null, seed) if unit == "edges" else float("nan")
    cross: tuple[dict[str, Any], ...] = ()
    if wb is not None and tasks is not None:
        cross = cross_faithfulness(
            wb, (a, b), tasks, ablation=ablation, metric=metric, n_random=n_random, seed=seed, batch_size=batch_size,
            memory=memory, progress=progress,
        )  # fmt: skip
    elif (wb is None) != (tasks is None):
        raise InterventionError("cross-faithfulness needs wb= and tasks=, both")
    found = _intervals(a, b, unit, names, usable, n_bootstrap if by_scores else 0, seed)
    ends = middle(chance["curve"])
    curves = {"jaccard": tuple(_matched(scores_a, scores_b, usable))}
    curves |= {"expected": tuple(chance["curve"].mean(0).tolist())}
    curves |= {f"expected_{name}": tuple(end.tolist()) for name, end in zip(("low", "high"), ends, strict=True)}
    if found.curve:
        low, high = zip(*found.curve, strict=True)
        curves |= {"low": low, "high": high}
    stages = _stages(a, b)
    for stage, interval in zip(stages, found.stages, strict=False):
        stage["interval"] = interval
    return CircuitOverlap(
        a=repr(a), b=repr(b), tasks=(a.task, b.task), unit=unit,
        shared=_named(names, inside_a & inside_b), only_a=_named(names, inside_a & ~inside_b),
        only_b=_named(names, inside_b & ~inside_a), values=values,
        intervals=found.measures, null=chance["jaccard"], p_value=among_draws(chance[statistic], values[statistic]),
        stages=tuple(stages), sizes=tuple(usable), fractions=tuple(usable.values()), statistic=statistic,
        p_beyond_nodes=beyond, unscored=int((scores_a.isnan() | scores_b.isnan()).sum()),
        curve=curves, cross_faithfulness=cross, ablation=ablation, model=a.model,
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
    return circuit.members[[circuit.graph.sender_index[name] for name in names]]


def _scores(circuit: Circuit, unit: str, names: Sequence[str]) -> Tensor:
    """|score| of each item, NaN where it has none."""
    if unit == "edges":
        return circuit.edge_scores[circuit.graph.exists].abs()
    return circuit.node_scores[[circuit.graph.sender_index[name] for name in names]].abs()


def _sizes(scores_a: Tensor, scores_b: Tensor, fractions: Sequence[float]) -> dict[int, float]:
    """How many items are matched at each fraction of all: as many as both have scores for that are not 0."""
    known = ~scores_a.isnan() & ~scores_b.isnan()
    most = min(int((scores[known] > 0).sum()) for scores in (scores_a, scores_b))
    return {int(f * len(known)): f for f in fractions if 0 < int(f * len(known)) <= most}


def _matched(scores_a: Tensor, scores_b: Tensor, sizes: Iterable[int]) -> list[float]:
    """For each size, the Jaccard overlap of so many highest scores among the items that have one in both.

    Equal scores at the border share membership. NaN where fewer items have a score.
    """
    known = ~scores_a.isnan() & ~scores_b.isnan()
    both = [scores[known] for scores in (scores_a, scores_b)]
    falling = [scores.sort(descending=True).values for scores in both]
    found = []
    for n in sizes:
        if len(both[0]) < n:
            found.append(float("nan"))
            continue
        one, two = (top_weights(scores, n, ordered) for scores, ordered in zip(both, falling, strict=True))
        shared = float((one * two).sum())
        found.append(shared / (2 * n - shared))
    return found


def _by_chance(
    graph: Graph, unit: str, names: Sequence[str], renamings: Renamings, inside: tuple[Tensor, Tensor],
    scores: tuple[Tensor, Tensor], sizes: Iterable[int],
) -> dict[str, Tensor]:  # fmt: skip
    """[draw] "jaccard" and "weighted" and [draw, size] "curve", with the second circuit's heads renamed."""
    known = ~scores[0].isnan() & ~scores[1].isnan()
    tops = [[torch.zeros(len(known), dtype=torch.float64) for _ in sizes] for _ in scores]
    for each, own in zip(tops, scores, strict=True):
        for weights, n in zip(each, sizes, strict=True):
            weights[known] = top_weights(own[known], n)
    mass = [own.nan_to_num(0.0) / own.nansum().clamp_min(1e-300) for own in scores]
    found: dict[str, list[Tensor]] = {"jaccard": [], "weighted": [], "curve": []}
    edges = unit == "edges"
    items = torch.tensor([] if edges else [graph.sender_index[name] for name in names], dtype=torch.long)
    for index in renamings.of_edges() if edges else renamings.of_senders(items):
        other = inside[1][index]
        both, either = (inside[0] & other).sum(1), (inside[0] | other).sum(1)
        found["jaccard"].append(both.double() / either)
        moved = mass[1][index]
        found["weighted"].append(torch.minimum(mass[0], moved).sum(1) / torch.maximum(mass[0], moved).sum(1))
        shared = [(top_a * top_b[index]).sum(1) / n for top_a, top_b, n in zip(*tops, sizes, strict=True)]
        each = [one / (2 - one) for one in shared]
        found["curve"].append(torch.stack(each, 1) if each else torch.zeros(len(index), 0, dtype=torch.float64))
    return {name: torch.cat(several) for name, several in found.items()}


def _measure(inside_a: Tensor, inside_b: Tensor, scores_a: Tensor, scores_b: Tensor) -> dict[str, float]:
    both = float((inside_a & inside_b).sum())
    return {
        "jaccard": jaccard(inside_a, inside_b),
        "of_a": both / float(inside_a.sum()), "of_b": both / float(inside_b.sum()),
        "rank_biased": rank_biased(scores_a, scores_b), "weighted": weighted_jaccard(scores_a, scores_b),
    }  # fmt: skip


@dataclass(frozen=True)
class _Intervals:
    """95 % intervals of the mean overlap of circuits from as many new prompts; empty where no scores were kept."""

    measures: dict[str, tuple[float, float]]
    stages: list[tuple[float, float]]
    curve: list[tuple[float, float]]


def _intervals(
    a: Circuit, b: Circuit, unit: str, names: Sequence[str], sizes: Iterable[int], n: int, seed: int
) -> _Intervals:
    """Draw the prompts of both tasks anew, and choose the circuits again in each draw."""
    if a.examples is None or b.examples is None or n == 0:
        return _Intervals({}, [], [])
    measures: list[list[float]] = []
    stages: list[list[float]] = []
    curve: list[list[float]] = []
    for index_a, index_b in zip(draws(len(a.examples), n, seed), draws(len(b.examples), n, seed + 1), strict=True):
        one, two = a.redrawn(index_a), b.redrawn(index_b)
        inside = _members(one, unit, names), _members(two, unit, names)
        scores = _scores(one, unit, names), _scores(two, unit, names)
        stages.append([stage["jaccard"] for stage in _stages(one, two)])
        curve.append(_matched(*scores, sizes))
        if bool(inside[0].any()) and bool(inside[1].any()):
            measures.append(list(_measure(*inside, *(each.nan_to_num(0.0) for each in scores)).values()))
    n_prompts = min(len(a.examples), len(b.examples))
    whole = [
        _measure(_members(a, unit, names), _members(b, unit, names), *(
            _scores(one, unit, names).nan_to_num(0.0) for one in (a, b)
        )).values(),
        [stage["jaccard"] for stage in _stages(a, b)],
        _matched(_scores(a, unit, names), _scores(b, unit, names), sizes),
    ]  # fmt: skip
    ends = [_around(list(one), drawn, n_prompts) for one, drawn in zip(whole, (measures, stages, curve), strict=True)]
    return _Intervals(dict(zip(MEASURES, ends[0], strict=False)), ends[1], ends[2])


def _around(found: Sequence[float], drawn: Sequence[Sequence[float]], n: int) -> list[tuple[float, float]]:
    """95 % intervals of each column of draws around what was found, within 0 and 1."""
    if not drawn or not found:
        return []
    whole, several = (torch.tensor(each, dtype=torch.float64) for each in (found, drawn))
    return [(low, high) for low, high in drawn_t(whole, several, n).clamp(0, 1).tolist()]


def _stages(a: Circuit, b: Circuit) -> list[dict[str, Any]]:
    """Overlap of what each stage chose, as in Merullo et al. (2310.08744)."""
    if not a.stages or len(a.stages) != len(b.stages):
        return []
    found = []
    for one, two in zip(a.stages, b.stages, strict=True):
        x, y = set(one["chosen"]), set(two["chosen"])
        found.append({"name": one["name"], "jaccard": len(x & y) / max(1, len(x | y)), "shared": tuple(sorted(x & y))})
    return found


def _named(names: Sequence[str], inside: Tensor) -> tuple[str, ...]:
    return tuple(names[i] for i in inside.nonzero()[:, 0].tolist())
