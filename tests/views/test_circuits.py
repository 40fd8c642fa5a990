"""Circuits and what is measured of them: what the views draw and say is what the results hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from views.test_results import shown
from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.faithful import Faithfulness, FaithfulnessCurve
from workbench.analysis.circuits.graph import Graph, Layer
from workbench.analysis.circuits.overlap import CircuitOverlap
from workbench.analysis.circuits.patching import HeadPatching
from workbench.analysis.circuits.repair import Repair
from workbench.analysis.circuits.roles import HeadRoles
from workbench.analysis.circuits.stability import Stability
from workbench.errors import InterventionError, ReportError
from workbench.views import circuit_graph, of

HOSTILE = "<img src=x onerror=alert(1)>"


def circuit(graph: Graph, kept: int, level: str = "edge") -> Circuit:
    """A circuit of the `kept` strongest of edges with random scores."""
    scores = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[~graph.exists] = torch.nan
    inside = torch.zeros_like(graph.exists)
    order = scores.nan_to_num(0.0).abs().flatten().argsort(descending=True)[:kept]
    inside.view(-1)[order] = True
    senders = inside.any(1)
    return Circuit(
        model=graph.facts, task="ioi", method="eap", metric="logit_diff", direction="noising", sign="positive helps",
        level=level, senders_in=senders, edges_in=inside if level == "edge" else torch.zeros_like(inside),
        node_scores=scores.nan_to_num(0.0).abs().sum(1), edge_scores=scores, threshold={"kind": "top", "value": kept},
        stages=(), examples=None, clean=torch.ones(3), corrupted=torch.zeros(3), settings={}, provenance={},
    )  # fmt: skip


def lines(view: object) -> list[dict]:  # type: ignore[type-arg]
    return view._whole["data"]  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("graph", [Graph.gpt2(2, 3, 8), Graph((Layer(4, 2), Layer(4, 2, parallel=True)), 8)])
def test_the_graph_draws_every_edge_and_node_once(graph: Graph, tmp_path: Path) -> None:
    found = circuit(graph, 12)
    view = circuit_graph(found)
    drawn = [trace for trace in lines(view) if trace["mode"] == "lines"]
    segments = sum(len(trace["x"]) // 3 for trace in drawn)
    assert segments == found.n_edges == 12
    raised = sum(len(trace["x"]) // 3 for trace in drawn if trace["name"].endswith("raise"))
    assert raised == int((found.edge_scores[found.edges_in] >= 0).sum())
    nodes = next(trace for trace in lines(view) if trace["name"] == "nodes")
    assert len(nodes["x"]) == len(found.nodes)
    heads = [tuple(row) for row in np.asarray(nodes["customdata"]).tolist() if row[0] >= 0]
    assert {f"L{layer}H{head}" for layer, head in heads} == set(found.heads)
    shown(found, tmp_path)


def test_edges_beyond_the_most_are_left_out_and_said() -> None:
    view = circuit_graph(circuit(Graph.gpt2(2, 3, 8), 20), most=5)
    assert sum(len(trace["x"]) // 3 for trace in lines(view) if trace["mode"] == "lines") == 5
    assert "The 5 strongest edges are drawn, of 20" in " ".join(view.spec.notes)


def test_the_caption_says_what_a_circuit_of_this_size_keeps() -> None:
    graph = Graph.gpt2(2, 3, 8)
    found = circuit(graph, 12)
    measured = replace(curve((6, 12, graph.n_edges)), task=found.task, circuit=repr(found))
    assert "size, 12, keeps 60%" in circuit_graph(found, curve=measured).spec.caption
    with pytest.raises(ReportError, match="the curve is of"):
        circuit_graph(circuit(graph, 5), curve=measured)


def test_an_empty_circuit_is_refused() -> None:
    with pytest.raises(InterventionError, match="empty"):
        circuit_graph(circuit(Graph.gpt2(2, 3, 8), 0))


def curve(sizes: tuple[int, ...]) -> FaithfulnessCurve:
    examples = torch.tensor([[[0.1, 0.3], [0.5, 0.7], [1.0, 1.0]]] * 2, dtype=torch.float64)
    return FaithfulnessCurve(
        circuit="", task=HOSTILE, metric="logit_diff", ablation="mean", level="edge", fractions=(0.1, 0.5, 1.0),
        sizes=sizes, kept_absolute=sizes, kept_signed=sizes, examples=examples, full=torch.ones(2).double(),
        none=torch.zeros(2).double(), provenance={},
    )  # fmt: skip


def test_a_curve_shows_both_orders_and_both_areas(tmp_path: Path) -> None:
    found = curve((2, 4, 8))
    view = of(found)
    drawn = {trace["name"]: np.asarray(trace["y"]) for trace in lines(view)}
    np.testing.assert_allclose(drawn["by magnitude"], found.absolute)
    np.testing.assert_allclose(drawn["by signed score"], found.signed)
    assert f"CPR {found.cpr:.3f}" in view.spec.caption
    assert f"CMD {found.cmd:.3f}" in view.spec.caption
    assert HOSTILE in view.spec.title  # the page escapes it, once
    shown(found, tmp_path)


def test_faithfulness_is_bars(tmp_path: Path) -> None:
    ones = torch.ones(4).double()
    found = Faithfulness(
        circuit="a circuit", task="ioi", metric="logit_diff", ablation="mean", alone=0.5 * ones, full=ones,
        none=0 * ones, subsets=(("a0.h1",),), without=torch.full((1, 4), 0.8).double(),
        alone_without=torch.full((1, 4), 0.4).double(), members=("a0.h1",),
        minus_one=torch.full((1, 4), 0.3).double(), provenance={},
    )  # fmt: skip
    bars = lines(of(found))[0]
    np.testing.assert_allclose(np.asarray(bars["x"]), [0.5, 0.4, 0.2])
    shown(found, tmp_path)


def test_an_overlap_counts_what_is_shared_where_it_begins(tmp_path: Path) -> None:
    found = CircuitOverlap(
        a="", b="", tasks=("ioi", HOSTILE), unit="edges", shared=("input->a0.h1<q>", "a0.h1->logits", "a0.h1->m0"),
        only_a=("m0->logits",), only_b=("a0.h0->m0",), values={"jaccard": 0.6}, intervals={"jaccard": (0.4, 0.8)},
        null=torch.tensor([0.1, 0.2, 0.2]), p_value=0.25, stages=(), sizes=(2, 4), fractions=(0.1, 0.2),
        curve={"jaccard": (0.5, 0.6), "expected": (0.1, 0.2)}, cross=(), ablation="mean", provenance={},
    )  # fmt: skip
    view = of(found)
    drawn = {trace["name"]: trace for trace in lines(view) if "name" in trace}
    assert drawn["shared"]["text"] == ["input: 1", "L0H1: 2"]
    assert np.asarray(drawn["shared"]["customdata"]).tolist() == [[-1, -1], [0, 1]]
    assert "<img" not in str(view.spec.facts)
    assert "p 0.25" in view.spec.caption
    shown(found, tmp_path)


def test_patching_is_an_atlas_of_shares_by_place(tmp_path: Path) -> None:
    found = HeadPatching(
        heads=("L0H0", "L1H1"), layers=(0, 1), numbers=(0, 1), activation="z", places=("end", "S2"),
        direction="noising", sign="positive helps", task="ioi", metric="logit_diff",
        effects=torch.tensor([[[-1.0, -1.0], [0.0, 0.0]], [[-0.5, -0.5], [0.5, 0.5]]]).double(),
        clean=torch.full((2,), 2.0).double(), corrupted=torch.zeros(2).double(), provenance={},
    )  # fmt: skip
    spec = of(found).spec
    values = spec.blocks["values"]
    np.testing.assert_allclose(np.sort(values[np.isfinite(values)].reshape(2, 2)), [[0.25, 0.5], [-0.25, 0.0]])
    assert [metric["label"] for metric in spec.facts["metrics"]] == ["end", "S2"]
    shown(found, tmp_path)


def test_roles_are_an_atlas_of_their_evidence(tmp_path: Path) -> None:
    nan = torch.full((2,), torch.nan)
    found = HeadRoles(
        heads=("L0H0", "L1H1"), roles=(("previous-token",), ()), threshold=0.3, task="ioi", errors={}, provenance={},
        evidence={"previous": torch.tensor([0.9, 0.1]), "to_question": nan},
    )  # fmt: skip
    spec = of(found).spec
    assert [metric["label"] for metric in spec.facts["metrics"]] == ["previous"]
    assert "previous-token: L0H0" in spec.caption
    shown(found, tmp_path)


def test_stability_and_repair_are_bars(tmp_path: Path) -> None:
    stable = Stability(
        circuit="", level="edge", items=("a0.h1->logits", "m0->logits"), frequency=torch.tensor([0.5, 1.0]),
        inside=torch.tensor([True, True]), jaccard=torch.tensor([0.8]), unit="prompts", provenance={},
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(lines(of(stable))[0]["x"]), [1.0, 0.5])
    shown(stable, tmp_path)
    repaired = Repair(
        task="colored_objects", heads=("L1H1",), towards=("wrong_colour",), but="colour",
        before=torch.tensor([1.0, 0.0, 0.0, 1.0]), together=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        single=torch.tensor([[1.0, 1.0, 0.0, 0.0]]), random=torch.tensor([[0.0, 0.0, 0.0, 1.0]]),
        random_heads=(("L0H0",),), movers=(), attention_before=torch.zeros(0, 2, 4),
        attention_after=torch.zeros(0, 2, 4), provenance={},
    )  # fmt: skip
    view = of(repaired)
    np.testing.assert_allclose(np.asarray(lines(view)[0]["x"]), [0.5, 0.75, 0.5, 0.25])
    assert "rises from 0.500 to 0.750; 25.0% of the prompts were right and are wrong after" in view.spec.caption
    shown(repaired, tmp_path)
