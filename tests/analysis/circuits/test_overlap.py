"""Overlap: its measures, chance, intervals, and what circuits do on each other's tasks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from support.circuits import Words, induction_model, random_task, tiny
from workbench import CircuitOverlap
from workbench.analysis.circuits.cross_faithfulness import _edge_layers, random_like
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.nodes import Layer
from workbench.analysis.circuits.overlap_null import Renamings, fitted_to_degrees
from workbench.analysis.statistics.overlap import jaccard, rank_biased, top_weights, weighted_jaccard
from workbench.errors import InterventionError
from workbench.storage import files


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


def test_circuits_without_scores_have_no_rankings(two: Any, tmp_path: Path) -> None:
    a, b = (
        replace(one, node_scores=torch.full_like(one.node_scores, torch.nan)).with_nodes(heads)
        for one, heads in zip((two[2]["ablation"][0],) * 2, ([(0, 0)], [(0, 1)]), strict=True)
    )
    found = workbench.circuit_overlap(a, b, n_null=20)
    assert found.values["jaccard"] == found.values["weighted"] == 0
    assert math.isnan(found.values["rank_biased"])
    found.save(tmp_path / "o")
    assert math.isnan(workbench.CircuitOverlap.load(tmp_path / "o").values["rank_biased"])
    assert found.to_html(tmp_path / "o.html")


def test_renaming_moves_groups_whole_and_keeps_the_graph() -> None:
    layers = (Layer(4, 2, stream="encoder"), Layer(2, 2, stream="decoder"), Layer(4, 2, kind="cross", stream="decoder"))
    graph = Graph(layers, d_model=8)
    renamed = Renamings.draw(graph, 50, seed=0)
    assert renamed.n_different == 2 * 2**2 * 2 * 2 * 2**2
    s, r = graph.exists.nonzero().T
    edges = torch.cat(list(renamed.of_edges()))
    for senders, receivers, index in zip(renamed.senders, renamed.receivers, edges, strict=True):
        assert sorted(index.tolist()) == list(range(graph.n_edges))
        assert torch.equal(s[index], senders[s])
        assert torch.equal(r[index], receivers[r])
        for i, layer in enumerate(graph.layers):
            first, size = graph.first_sender(i), layer.n_heads // layer.n_kv_heads
            groups = (senders[first : first + layer.n_heads] - first) // size
            assert torch.equal(
                groups, (receivers[graph.columns(i, "k")] - graph.columns(i, "k").start).repeat_interleave(size)
            )
        fixed = [k for k, name in enumerate(graph.senders) if ".h" not in name]
        assert torch.equal(senders[fixed], torch.tensor(fixed))
    assert len({tuple(one) for one in renamed.senders.tolist()}) > 20


def circuit_of(scores: torch.Tensor, like: Any, share: float = 0.1) -> Any:
    own = scores.masked_fill(~like.graph.exists, torch.nan)
    return replace(like, edge_scores=own, node_scores=own.nan_to_num(0.0).sum(1), examples=None).top(share, prune=False)


@pytest.mark.parametrize("kind", ["node effects", "strong MLPs"])
def test_p_values_hold_their_level_where_circuits_cluster(two: Any, kind: str) -> None:
    """Independent scores, multiplied by effects of their nodes, or stronger at MLPs in both circuits."""
    like = two[2]["eap"][0]
    graph, generator = like.graph, torch.Generator().manual_seed(0)
    mlps = torch.tensor([name.startswith("m") for name in graph.senders])

    def draw() -> Any:
        scores = torch.randn(graph.exists.shape, generator=generator, dtype=torch.float64).abs()
        if kind == "strong MLPs":
            return circuit_of(torch.where(mlps[:, None], 3.0, 1.0) * scores, like)
        effects = (torch.randn(n, generator=generator, dtype=torch.float64) for n in graph.exists.shape)
        sending, receiving = (effect.exp() for effect in effects)
        return circuit_of(scores * sending[:, None] * receiving, like)

    found = [workbench.circuit_overlap(draw(), draw(), n_null=99, n_bootstrap=0, seed=i) for i in range(80)]
    for values in ([one.p_value for one in found], [one.p_beyond_nodes for one in found]):
        assert sum(p <= 0.05 for p in values) <= 10  # of 80: more have a probability of 0.003
    assert "renamed at random within layers" in found[0].meaning
    assert "degrees explain" in found[0].meaning


def test_shared_edges_are_found_and_what_nodes_explain_is_not(two: Any) -> None:
    like = two[2]["eap"][0]
    graph, generator = like.graph, torch.Generator().manual_seed(1)
    one = torch.randn(graph.exists.shape, generator=generator, dtype=torch.float64).abs()
    other = torch.where(torch.rand(one.shape, generator=generator) < 0.5, one, one.flatten().flip(0).view(one.shape))
    found = workbench.circuit_overlap(circuit_of(one, like), circuit_of(other, like), n_null=199, n_bootstrap=0)
    assert found.p_value <= 0.05
    assert found.p_beyond_nodes <= 0.05
    sending = (2 * torch.randn(len(graph.senders), generator=generator, dtype=torch.float64)).exp()
    noise = [torch.rand(one.shape, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2)]
    same_nodes = workbench.circuit_overlap(
        *(circuit_of(sending[:, None] * x, like) for x in noise), n_null=199, n_bootstrap=0
    )
    assert same_nodes.p_beyond_nodes > 0.05


def test_probabilities_fitted_to_degrees_have_them(two: Any) -> None:
    circuit = two[2]["eap"][0]
    chances = fitted_to_degrees(circuit.edges_in, circuit.graph.exists)
    for axis in (0, 1):
        torch.testing.assert_close(chances.sum(axis), circuit.edges_in.sum(axis).double(), atol=0.02, rtol=0.01)
    assert (chances[~circuit.graph.exists] == 0).all()


def test_equal_scores_share_what_is_left_and_unscored_edges_are_counted(two: Any) -> None:
    like = two[2]["eap"][0]
    graph, n, k = like.graph, like.graph.n_edges, 6
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    scores = [torch.zeros(n, dtype=torch.float64) for _ in range(2)]
    scores[0][order[:k]] = 1 + torch.rand(k, dtype=torch.float64)
    scores[1][order[k : 2 * k]] = 1 + torch.rand(k, dtype=torch.float64)
    tables = [torch.full(graph.exists.shape, torch.nan, dtype=torch.float64) for _ in scores]
    for table, own in zip(tables, scores, strict=True):
        table[graph.exists] = own
    tables[1][tuple(graph.exists.nonzero()[order[-1]])] = torch.nan
    a, b = (replace(like, edge_scores=table, examples=None).top(k, prune=False) for table in tables)
    found = workbench.circuit_overlap(a, b, n_null=50, n_bootstrap=0, fractions=(k / n + 1e-9, 0.5))
    assert found.sizes == (k,)  # beyond it all are equal
    assert found.curve["jaccard"] == (0.0,)
    assert found.unscored == 1
    assert 0 <= found.curve["expected_low"][0] <= found.curve["expected"][0] <= found.curve["expected_high"][0] <= 1
    assert top_weights(torch.tensor([1.0, 0.0, 0.0, 0.0]), 3).tolist() == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3])


@pytest.mark.parametrize("kind", ["shared keys", "encoder and decoder"])
def test_p_values_hold_their_level_in_other_graphs(two: Any, kind: str) -> None:
    layers = {
        "shared keys": (Layer(4, 2),) * 4,
        "encoder and decoder": (Layer(4, 4, stream="encoder"),) * 2
        + (Layer(4, 4, mlp=False, stream="decoder"), Layer(4, 4, kind="cross", stream="decoder")) * 2,
    }
    graph, generator = Graph(layers[kind], d_model=8), torch.Generator().manual_seed(0)
    none = torch.zeros(len(graph.senders), dtype=torch.bool)
    like = replace(two[2]["eap"][0], model=graph.facts, senders_in=none, edges_in=torch.zeros_like(graph.exists))

    def draw() -> Any:
        effects = [torch.randn(n, generator=generator, dtype=torch.float64).exp() for n in graph.exists.shape]
        noise = torch.randn(graph.exists.shape, generator=generator, dtype=torch.float64).abs()
        return circuit_of(noise * effects[0][:, None] * effects[1], like)

    p = [workbench.circuit_overlap(draw(), draw(), n_null=99, n_bootstrap=0, fractions=()).p_value for _ in range(40)]
    assert sum(one <= 0.05 for one in p) <= 6  # of 40: more have a probability of 0.003
    assert sum(one <= 0.5 for one in p) > 9


def test_files_from_before_load_and_keep_their_keys(two: Any, tmp_path: Path) -> None:
    a, b = two[2]["eap"]
    found = workbench.circuit_overlap(a, b, n_null=10, n_bootstrap=0)
    header, _ = files.read(found.save(tmp_path / "overlap"), found.form)
    assert "cross" in header["fields"].items()
    assert "cross_faithfulness" not in header["fields"].items()
    loaded = CircuitOverlap.load(tmp_path / "overlap")
    assert loaded.cross_faithfulness == found.cross_faithfulness
    assert loaded.values == found.values


def test_a_model_of_few_heads_says_that_no_p_value_is_small(two: Any) -> None:
    graph = Graph((Layer(2, 2), Layer(2, 1)), d_model=8)
    small = replace(two[2]["eap"][0], model=graph.facts, senders_in=torch.zeros(len(graph.senders), dtype=torch.bool),
                    edges_in=torch.zeros_like(graph.exists))  # fmt: skip
    found = circuit_of(torch.rand(graph.exists.shape, dtype=torch.float64), small)
    with pytest.warns(UserWarning, match="in only 4 ways"):
        workbench.circuit_overlap(found, found, n_null=10, n_bootstrap=0)


def test_measures_are_those_of_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(20, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = (x.argsort(descending=True).tolist() for x in (a, b))
    p, terms = 0.9, []
    for depth in range(1, 21):
        terms.append(len(set(first[:depth]) & set(second[:depth])) / depth)
    expected = terms[-1] * p**20 + (1 - p) / p * sum(p ** (d + 1) * t for d, t in enumerate(terms))
    assert rank_biased(a, b, p) == pytest.approx(expected)
    short = b.where(b >= b.sort().values[-7], 0.0)  # ranks only seven
    expected = terms[6] * p**7 + (1 - p) / p * sum(p ** (d + 1) * t for d, t in enumerate(terms[:7]))
    assert rank_biased(a, short, p) == rank_biased(short, a, p) == pytest.approx(expected)
    halves = torch.zeros(2, 20, dtype=torch.float64)  # ten tied items each, of which they share five
    halves[0, :10] = halves[1, 5:15] = 1.0
    assert rank_biased(halves[0], halves[1]) == pytest.approx(0.5)
    assert rank_biased(halves[0], halves[0]) == pytest.approx(1)
    assert math.isnan(rank_biased(halves[0], torch.zeros(20)))
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
        for one in random_like(own, 4, seed=0):
            if method == "eap":
                layers = _edge_layers(own.graph)
                mine, other = (layers[c.edges_in[own.graph.exists]] for c in (own, one))
            else:
                mine, other = (torch.tensor([int(head[1]) for head in c.heads]) for c in (own, one))
            assert torch.equal(mine.sort().values, other.sort().values)
        drawn = {tuple(c.nodes if method == "ablation" else c.edges) for c in random_like(own, 4, seed=0)}
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
    assert [(one["do"], one["random"]) for one in found.cross_faithfulness[:4]] == [
        ("keep", False), ("keep", True), ("ablate", False), ("ablate", True),
    ]  # fmt: skip
    assert len(found.cross_faithfulness) == 16
    kept = workbench.circuit_faithfulness(wb, a, tasks[0], progress=False)
    if method == "eap":
        assert found.unit == "edges"
        assert found.cross_faithfulness[0]["value"] == pytest.approx(kept.value)
    for one in found.cross_faithfulness:
        assert one["interval"][0] <= one["value"] <= one["interval"][1] or not one["defined"]
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
