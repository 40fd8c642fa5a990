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
from workbench.analysis.circuits.faithful import MIB_FRACTIONS
from workbench.tasks import InputTask, from_inputs

HERE = Path(__file__).parent
FIGURES: dict[str, Any] = json.loads((HERE / "mib_figures.json").read_text(encoding="utf-8"))
# Their integrated gradients leave the prompt's own gradient out and take the twin's in: our denoising direction.
HOW: dict[str, dict[str, Any]] = {
    "EAP": {"method": "eap"},
    "EAP-IG-inputs": {"method": "eap_ig", "steps": case.STEPS, "direction": "denoising"},
}


@pytest.fixture(scope="module")
def studied() -> Iterator[tuple[Any, InputTask]]:
    ids, twins, right, wrong = case.prompts()
    task = from_inputs({"input_ids": ids}, {"input_ids": twins}, right.tolist(), wrong.tolist(), name="mib")
    with workbench.attach(case.model()) as wb:
        yield wb, task


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


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("method", HOW)
def test_circuits_of_every_size(studied: Any, method: str, absolute: bool) -> None:
    circuit, theirs = found(studied, method), FIGURES[method]["absolute" if absolute else "signed"]
    names = list(FIGURES[method]["scores"])
    sizes = set()
    for share, edges in zip(MIB_FRACTIONS, theirs["sets"], strict=True):
        chosen = circuit.top(int(share * circuit.graph.n_edges), absolute=absolute)
        differ = set(chosen.edges) ^ {names[i] for i in edges}
        assert all(FIGURES[method]["scores"][name] == 0 for name in differ)  # which of several zeros is chance
        assert len(chosen.edges) == len(edges)
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
