"""Scores, circuits, faithfulness, CPR and CMD against what MIB's own code printed (`mib_figures.py` tells how)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from support import mib_case as case
from workbench import Circuit
from workbench.analysis.circuits.engine.edges import run_edges
from workbench.analysis.circuits.engine.setup import open_setup
from workbench.analysis.circuits.faithfulness_curve import MIB_FRACTIONS
from workbench.tasks import InputTask, from_inputs

HERE = Path(__file__).parent
FIGURES: dict[str, Any] = json.loads((HERE / "mib_figures.json").read_text(encoding="utf-8"))
# Their integrated gradients leave the prompt's own gradient out and take the twin's in: our denoising direction.
HOW: dict[str, dict[str, Any]] = {
    "EAP": {"method": "eap"},
    "EAP-IG-inputs": {"method": "eap_ig", "steps": case.STEPS, "direction": "denoising"},
}


def the_task() -> InputTask:
    ids, twins, right, wrong = case.prompts()
    return from_inputs({"input_ids": ids}, {"input_ids": twins}, right.tolist(), wrong.tolist(), name="mib")


@pytest.fixture(scope="module")
def studied() -> Iterator[tuple[Any, InputTask]]:
    with workbench.attach(case.model()) as wb:
        yield wb, the_task()


@pytest.fixture(scope="module")
def grouped() -> Iterator[tuple[Any, InputTask]]:
    with workbench.attach(case.grouped_model()) as wb:
        yield wb, the_task()


def found(studied: Any, method: str) -> Circuit:
    wb, task = studied
    circuit = workbench.find_circuit(wb, task, **HOW[method], batch_size=case.BATCH, progress=False)
    assert isinstance(circuit, Circuit)
    return circuit


@pytest.mark.parametrize("method", HOW)
def test_scores(studied: Any, method: str) -> None:
    """Theirs are means of the batches' means over the number of prompts: a factor, and the same order."""
    circuit, theirs = found(studied, method), FIGURES[method]["scores"]
    assert set(circuit.graph.edges) == set(theirs)
    ours = torch.tensor([circuit.score_of(name) for name in theirs], dtype=torch.float64)
    other = torch.tensor(list(theirs.values()), dtype=torch.float64) * case.BATCH
    assert (ours - other).abs().max() < 1e-9 * other.abs().max()
    assert other.abs().max() > 0.1


def by_rule(studied: Any, ablation: str) -> list[float]:
    """[example] of the metric with the circuit that their code was run with too, which no score has chosen."""
    with open_setup(*studied, batch_size=case.BATCH) as setup:
        setup.measure_baselines()
        graph = setup.graph
        rows = [[case.chosen(sender, receiver) for receiver in graph.receivers] for sender in graph.senders]
        kept = graph.pruned(torch.tensor(rows))
        assert 0 < int(kept.sum()) < graph.n_edges
        return run_edges(setup, kept[None], ablation, progress=False)[0].tolist()


def test_integrated_gradients_differ_by_the_end_that_is_left_out(studied: Any) -> None:
    wb, task = studied
    ours = workbench.find_circuit(wb, task, "eap_ig", steps=case.STEPS, batch_size=case.BATCH, progress=False)
    theirs = FIGURES["EAP-IG-inputs"]["scores"]
    away = max(abs(ours.score_of(name) / case.BATCH - score) for name, score in theirs.items())
    assert away > 0.02 * max(abs(score) for score in theirs.values())


def test_their_uneven_batches_weigh_the_same(studied: Any) -> None:
    """Ours weighs every example the same, whatever batch it is in."""
    circuit = found(studied, "EAP")
    each = dict(zip(circuit.graph.edges, circuit.single_scores.double().T, strict=True))
    for name, theirs in FIGURES["EAP in uneven batches"].items():
        means = each[name][: case.UNEVEN].mean() + each[name][case.UNEVEN :].mean()
        assert float(means) / len(each[name]) == pytest.approx(theirs, abs=1e-7)
        assert name == "input->logits" or float(each[name].mean()) / case.UNEVEN != pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("method", HOW)
def test_circuits_of_every_size(studied: Any, method: str, absolute: bool) -> None:
    circuit, theirs = found(studied, method), FIGURES[method]["absolute" if absolute else "signed"]
    names = list(FIGURES[method]["scores"])
    sizes = set()
    for share, edges, counted in zip(MIB_FRACTIONS, theirs["sets"], theirs["counts"], strict=True):
        chosen = circuit.top(int(share * circuit.graph.n_edges), absolute=absolute)
        differ = set(chosen.edges) ^ {names[i] for i in edges}
        assert all(FIGURES[method]["scores"][name] == 0 for name in differ)  # which of several zeros is chance
        assert len(chosen.edges) == len(edges) <= counted  # they count before all that leads nowhere is out
        sizes.add(len(edges))
    assert len(sizes) > 4


@pytest.mark.parametrize("method", HOW)
def test_faithfulness_and_its_areas(studied: Any, method: str) -> None:
    wb, task = studied
    circuit, theirs = found(studied, method), FIGURES[method]
    curve = workbench.faithfulness_curve(wb, circuit, task, batch_size=case.BATCH, progress=False)
    assert curve.fractions == case.FRACTIONS
    assert curve.absolute == pytest.approx(theirs["absolute"]["f"], abs=1e-9)
    assert curve.signed == pytest.approx(theirs["signed"]["f"], abs=1e-9)
    assert curve.cpr == pytest.approx(theirs["signed"]["cpr"], abs=1e-9)
    assert curve.cmd == pytest.approx(theirs["absolute"]["cmd"], abs=1e-9)
    assert max(abs(a - b) for a, b in zip(curve.absolute, curve.signed, strict=True)) > 0.05


def test_their_file_is_read_and_written_again(studied: Any, tmp_path: Path) -> None:
    circuit = found(studied, "EAP")
    theirs = Circuit.from_mib(HERE / "mib_graph.json", like=circuit)
    scores = FIGURES["EAP"]["scores"]
    assert {name: theirs.score_of(name) for name in scores} == pytest.approx(scores, abs=1e-12)
    written = json.loads(theirs.to_mib(tmp_path / "again.json").read_text(encoding="utf-8"))
    original = json.loads((HERE / "mib_graph.json").read_text(encoding="utf-8"))
    assert set(written["edges"]) == set(original["edges"])
    assert set(written["nodes"]) == set(original["nodes"])
    assert {key: written["cfg"][key] for key in ("n_layers", "n_heads", "d_model", "parallel_attn_mlp")} == {
        key: original["cfg"][key] for key in ("n_layers", "n_heads", "d_model", "parallel_attn_mlp")
    }
    rescaled = replace(circuit, edge_scores=circuit.edge_scores / case.BATCH)
    assert theirs.top(20).edges == rescaled.top(20).edges


@pytest.mark.parametrize("ablation", ["counterfactual", "mean_positional"])
def test_a_circuit_that_no_score_has_chosen(studied: Any, ablation: str) -> None:
    assert by_rule(studied, ablation) == pytest.approx(FIGURES["by rule"][ablation], abs=1e-9)


def test_scores_where_heads_share_keys(grouped: Any, tmp_path: Path) -> None:
    """Theirs has an edge for each head; those of a group add up to ours. Rotary angles are in single precision."""
    circuit, theirs = found(grouped, "EAP-IG-inputs"), FIGURES["grouped"]["scores"]
    cfg = {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 24}
    edges = {name: {"score": score * case.BATCH, "in_graph": False} for name, score in theirs.items()}
    (tmp_path / "theirs.json").write_text(json.dumps({"cfg": cfg, "nodes": {}, "edges": edges}), encoding="utf-8")
    summed = Circuit.from_mib(tmp_path / "theirs.json", like=circuit).edge_scores.nan_to_num()
    assert (circuit.graph.n_edges, len(theirs)) == (82, 110)
    assert (circuit.edge_scores.nan_to_num() - summed).abs().max() < 1e-5 * summed.abs().max()


@pytest.mark.parametrize("ablation", ["counterfactual", "zero"])
def test_circuits_where_heads_share_keys(grouped: Any, ablation: str) -> None:
    """Zero too, as this model adds no positions to its embeddings; theirs would keep them, ours does not."""
    assert by_rule(grouped, ablation) == pytest.approx(FIGURES["grouped"][ablation], abs=1e-5)


def test_what_is_written_is_what_their_reader_wants(grouped: Any, tmp_path: Path) -> None:
    """An edge for each head, and a number for every edge; what was not scored is so again when it is read."""
    wb, task = grouped
    for method in ("eap_ig", "path_patching"):
        circuit = workbench.find_circuit(wb, task, method, fraction=0.3, progress=False)
        path = circuit.to_mib(tmp_path / "c.json")
        written = json.loads(path.read_text(encoding="utf-8"))
        assert set(written["edges"]) == set(FIGURES["grouped"]["scores"])
        assert all(isinstance(edge["score"], float) for edge in written["edges"].values())
        assert set(written["nodes"]) == {
            "input",
            "logits",
            "m0",
            "m1",
            *(f"a{i}.h{h}" for i in (0, 1) for h in range(4)),
        }
        for like in (circuit, None):
            again = Circuit.from_mib(path, like=like)
            assert torch.equal(again.edge_scores.isnan(), circuit.edge_scores.isnan())
            assert torch.equal(again.edge_scores.nan_to_num(), circuit.edge_scores.nan_to_num())
            assert torch.equal(again.edges_in, circuit.edges_in)
    assert circuit.edge_scores[circuit.graph.exists].isnan().any()
