"""Overlap: its measures, chance, intervals, and what circuits do on each other's tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import workbench
from support.circuits import Words, induction_model, random_task, tiny
from workbench import CircuitOverlap
from workbench.analysis.circuits.cross_faithfulness import _edge_layers, _random_like
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.overlap import _null
from workbench.analysis.statistics.overlap import jaccard, rank_biased, weighted_jaccard
from workbench.errors import InterventionError


@pytest.fixture(scope="module")
def two() -> Any:
    wb = workbench.attach(tiny("gpt2"), Words())
    tasks = (random_task(5, 6, 60, seed=1), random_task(5, 6, 60, seed=2))
    yield (
        wb,
        tasks,
        {
            method: [workbench.find_circuit(wb, task, method, fraction=0.3, progress=False) for task in tasks]
            for method in ("ablation", "eap")
        },
    )
    wb.detach()


def test_of_equal_sets_it_is_one_and_of_disjoint_ones_zero(two: Any) -> None:
    a = two[2]["ablation"][0]
    same = workbench.circuit_overlap(a, a, n_bootstrap=0)
    assert same.values["jaccard"] == same.values["of_a"] == 1
    assert same.values["rank_biased"] == same.values["weighted"] == pytest.approx(1)
    others = [f"a{i}.h{h}" for i, h in a.graph.heads() if f"a{i}.h{h}" not in a.nodes][: len(a.heads)]
    apart = workbench.circuit_overlap(a, a.with_nodes(others), n_bootstrap=0)
    assert apart.values["jaccard"] == 0
    assert apart.shared == ()
    assert apart.p_value == 1


def test_chance_is_that_of_random_heads_within_layers() -> None:
    """8 of the 16 heads of one layer, and random 8 of 384 heads: 64/384 shared in the mean."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.zeros(384, dtype=torch.bool)
    inside[torch.randperm(384, generator=generator)[:8]] = True
    null = _null(inside, inside, torch.zeros(384), 40000, seed=0)
    shared = (16 * null / (1 + null)).mean()  # of J = s / (16 − s)
    assert float(shared) == pytest.approx(64 / 384, abs=0.01)
    layers = torch.arange(24).repeat_interleave(16)
    by_layer = _null(inside, inside, layers, 40000, seed=0)
    count = np.bincount(layers[inside].numpy(), minlength=24)
    assert float((16 * by_layer / (1 + by_layer)).mean()) == pytest.approx(float((count**2 / 16).sum()), abs=0.01)


def test_measures_are_those_of_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(20, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = (x.argsort(descending=True).tolist() for x in (a, b))
    p, terms = 0.9, []
    for depth in range(1, 21):
        terms.append(len(set(first[:depth]) & set(second[:depth])) / depth)
    expected = terms[-1] * p**20 + (1 - p) / p * sum(p ** (d + 1) * t for d, t in enumerate(terms))
    assert rank_biased(a, b, p) == pytest.approx(expected)
    x, y = a / a.sum(), b / b.sum()
    assert weighted_jaccard(a, b) == pytest.approx(float(torch.minimum(x, y).sum() / torch.maximum(x, y).sum()))
    assert jaccard(a > 2, b > 2) == 1


def test_paths_overlap_stage_by_stage(two: Any) -> None:
    wb, tasks, _ = two
    stages = (workbench.Stage("logits", name="logits"), workbench.Stage("q", of=((1, 1),), name="queries"))
    a, b = (workbench.find_circuit(wb, task, fraction=0.3, stages=stages, progress=False) for task in tasks)
    found = workbench.circuit_overlap(a, b, n_bootstrap=20, wb=wb, tasks=tasks, progress=False)
    assert [stage["name"] for stage in found.stages] == ["logits", "queries"]
    for stage, one, other in zip(found.stages, a.stages, b.stages, strict=True):
        x, y = set(one["chosen"]), set(other["chosen"])
        assert stage["jaccard"] == len(x & y) / len(x | y)
        assert 0 <= stage["interval"][0] <= stage["interval"][1] <= 1
    low, high = found.intervals["jaccard"]
    assert 0 <= low <= high <= 1
    assert all(0 <= low <= high <= 1 for low, high in zip(found.curve["low"], found.curve["high"], strict=True))


def test_random_circuits_have_as_much_in_every_layer(two: Any) -> None:
    _, _, circuits = two
    for method in ("ablation", "eap"):
        own = circuits[method][0]
        for one in _random_like(own, 4, seed=0):
            if method == "eap":
                layers = _edge_layers(own.graph)
                mine, other = (layers[c.edges_in[own.graph.exists]] for c in (own, one))
            else:
                mine, other = (torch.tensor([int(head[1]) for head in c.heads]) for c in (own, one))
            assert torch.equal(mine.sort().values, other.sort().values)
        drawn = {tuple(c.nodes if method == "ablation" else c.edges) for c in _random_like(own, 4, seed=0)}
        assert len(drawn) > 1


def test_redrawing_all_prompts_gives_the_circuit_again(two: Any) -> None:
    wb, tasks, circuits = two
    stages = (workbench.Stage("logits"), workbench.Stage("q"))
    paths = workbench.find_circuit(wb, tasks[0], fraction=0.3, stages=stages, progress=False)
    eap = circuits["eap"][0]
    signed = eap.top(20, absolute=False, prune=False)
    for own in (circuits["ablation"][0], eap, paths, signed, eap.above(float(eap.edge_scores.nanmean()))):
        again = own.redrawn(torch.arange(len(tasks[0])))
        assert again.nodes == own.nodes
        assert again.edges == own.edges
        assert torch.allclose(again.node_scores, own.node_scores, rtol=1e-5, equal_nan=True)
        names = [name for name in own.nodes if name in own.graph.sender_index]
        assert [own.graph.senders[i] for i in own.members.nonzero()[:, 0].tolist()] == names


@pytest.mark.parametrize("method", ["ablation", "eap"])
def test_circuits_are_kept_and_ablated_on_both_tasks(two: Any, method: str, tmp_path: Any) -> None:
    wb, tasks, circuits = two
    a, b = circuits[method]
    found = workbench.circuit_overlap(a, b, wb=wb, tasks=tasks, n_bootstrap=20, progress=False)
    assert [(one["do"], one["random"]) for one in found.cross[:4]] == [
        ("keep", False), ("keep", True), ("ablate", False), ("ablate", True),
    ]  # fmt: skip
    assert len(found.cross) == 16
    kept = workbench.circuit_faithfulness(wb, a, tasks[0], progress=False)
    if method == "eap":
        assert found.unit == "edges"
        assert found.cross[0]["value"] == pytest.approx(kept.value)
    for one in found.cross:
        assert one["interval"][0] <= one["value"] <= one["interval"][1]
    again = CircuitOverlap.load(found.save(tmp_path / "o.safetensors"))
    assert again.table.equals(found.table)
    assert len(found.curve["jaccard"]) == len(found.sizes) == len(found.fractions)


def test_bad_comparisons(two: Any) -> None:
    wb, tasks, circuits = two
    a, b = circuits["ablation"]
    model, task = induction_model()
    with workbench.attach(model, Words()) as other:
        stranger = workbench.find_circuit(other, task, "ablation", progress=False)
    for bad, says in (
        (lambda: workbench.circuit_overlap(a, stranger), "another model"),
        (lambda: workbench.circuit_overlap(a, b.with_nodes([])), "empty"),
        (lambda: workbench.circuit_overlap(a, b, unit="edges"), "two circuits of edges"),
        (lambda: workbench.circuit_overlap(a, b, unit="banana"), "compared by"),
        (lambda: workbench.circuit_overlap(a, b, wb=wb), "both"),
        (lambda: workbench.circuit_overlap(a, circuits["eap"][0], wb=wb, tasks=tasks, progress=False), "two of a kind"),
    ):
        with pytest.raises(InterventionError, match=says):
            bad()
    assert Graph.of(a.model) == a.graph
