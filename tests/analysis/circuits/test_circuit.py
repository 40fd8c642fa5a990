"""The circuit as a result: choosing, MIB's JSON, faithfulness, MIB's curves, stability, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from support.circuits import INDUCTION_EDGES, Words, induction_model, random_task, tiny
from workbench import Circuit
from workbench.analysis.circuits.faithfulness_curve import MIB_FRACTIONS, area
from workbench.analysis.circuits.stability import auroc
from workbench.analysis.statistics.correlation import rank_auroc
from workbench.errors import FormatError, InterventionError, TaskError
from workbench.tasks import from_prompts


@pytest.fixture(scope="module")
def found() -> Any:
    model, task = induction_model()
    wb = workbench.attach(model, Words())
    yield wb, task, workbench.find_circuit(wb, task, "eap_ig", n_edges=5, progress=False)
    wb.detach()


@pytest.fixture(scope="module")
def grouped() -> Any:
    wb = workbench.attach(tiny("llama-gqa"), Words())
    task = random_task(4, 6, 60)
    yield wb, task, {m: workbench.find_circuit(wb, task, m, fraction=0.2, progress=False) for m in ("eap", "ablation")}
    wb.detach()


def test_it_says_its_direction_and_sign(grouped: Any) -> None:
    _, _, circuits = grouped
    for circuit in circuits.values():
        assert circuit.direction == "noising"
        assert circuit.sign.startswith("noising: positive where the clean value")


@pytest.mark.parametrize("method", ["eap", "ablation"])
def test_it_is_saved_and_loaded(grouped: Any, method: str, tmp_path: Path) -> None:
    circuit = grouped[2][method]
    again = Circuit.load(circuit.save(tmp_path / "c.safetensors"))
    assert (again.nodes, again.edges, again.stages, again.provenance) == (
        circuit.nodes, circuit.edges, circuit.stages, circuit.provenance,
    )  # fmt: skip
    assert again.table.equals(circuit.table)


def test_choosing_by_size_and_score(found: Any) -> None:
    circuit = found[2]
    assert set(circuit.top(3).edges) == set(INDUCTION_EDGES)
    assert circuit.top(0).edges == ()
    lowest = min(abs(circuit.score_of(edge)) for edge in INDUCTION_EDGES)
    assert set(circuit.above(lowest).edges) == set(INDUCTION_EDGES)
    assert circuit.top(1.0).n_edges <= circuit.graph.n_edges
    signed = circuit.top(4, absolute=False, prune=False)
    assert all(circuit.score_of(edge) >= 0 for edge in signed.edges)
    with pytest.raises(InterventionError, match="cannot be cut out"):
        circuit.top(10**6)


def test_mib_is_written_and_read(grouped: Any, tmp_path: Path) -> None:
    circuit = grouped[2]["eap"]
    path = circuit.to_mib(tmp_path / "c.json")
    data = json.loads(path.read_text())
    assert set(data) == {"cfg", "nodes", "edges"}
    assert data["cfg"] == {
        "n_layers": 2, "n_heads": 6, "parallel_attn_mlp": False, "d_model": 48, "n_key_value_heads": 2,
    }  # fmt: skip
    again = Circuit.from_mib(path, circuit)
    assert again.edges == circuit.edges
    assert torch.equal(again.edge_scores.nan_to_num(), circuit.edge_scores.nan_to_num())
    assert Circuit.from_mib(path).nodes == circuit.nodes
    by_groups = json.loads(circuit.to_mib(tmp_path / "g.json", grouped=True).read_text())
    assert len(by_groups["edges"]) == circuit.graph.n_edges < len(data["edges"])
    assert torch.equal(Circuit.from_mib(tmp_path / "g.json").edge_scores.nan_to_num(), again.edge_scores.nan_to_num())


def test_curves_of_nodes_leave_out_mlps_that_are_scored(grouped: Any) -> None:
    wb, task, circuits = grouped
    scored = circuits["eap"].with_nodes(["m0"])  # from edges, so that the input and MLPs have scores too
    how = {"ablation": "mean", "progress": False}  # with twins' activations the last token's stream would be its twin's
    curve = workbench.faithfulness_curve(wb, scored, task, fractions=(0.2, 1.0), **how)
    assert curve.sizes == (3, 15)
    nothing = workbench.circuit_faithfulness(wb, scored, task, keep_mlps=False, **how).none
    assert curve.none.tolist() == pytest.approx(nothing.tolist())
    assert curve.absolute[-1] == pytest.approx(1)
    heads = workbench.faithfulness_curve(wb, circuits["ablation"], task, fractions=(0.5, 1.0), **how)
    assert float((heads.none - curve.none).abs().max()) > 1e-3  # only heads are scored: the rest is kept


def test_mib_with_an_edge_for_each_head_is_summed(grouped: Any, tmp_path: Path) -> None:
    circuit = grouped[2]["eap"]
    edges = {f"input->a1.h{head}<k>": {"score": head + 1.0, "in_graph": head == 4} for head in range(6)}
    cfg = {"n_layers": 2, "n_heads": 6, "parallel_attn_mlp": False, "d_model": 48}
    (tmp_path / "c.json").write_text(json.dumps({"cfg": cfg, "nodes": {"input": {"in_graph": True}}, "edges": edges}))
    again = Circuit.from_mib(tmp_path / "c.json", circuit)
    assert again.score_of("input->a1.kv0<k>") == 6
    assert again.score_of("input->a1.kv1<k>") == 15
    assert again.edges == ("input->a1.kv1<k>",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "no circuit"),
        ("[]", "no circuit"),
        ('{"cfg": {"n_layers": 2, "n_heads": 12, "d_model": 48}, "nodes": {}, "edges": {}}', "another model"),
        ('{"cfg": {"n_layers": 2, "n_heads": 6, "d_model": 48}, "nodes": {}, "edges": {"a->b": {}}}', "no edge"),
        ('{"cfg": {"n_layers": 2, "n_heads": 6, "d_model": 48}, "nodes": {"x": {}}, "edges": {}}', "has the node"),
        (
            '{"cfg": {"n_layers": 2, "n_heads": 6, "d_model": 48}, "nodes": {}, '
            '"edges": {"input->m0": {"score": "x"}}}',
            "not a number",
        ),
    ],
)
def test_json_that_is_none_or_of_another_model(grouped: Any, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(FormatError, match=says):
        Circuit.from_mib(tmp_path / "c.json", grouped[2]["eap"])
    with pytest.raises(FormatError, match="cannot be read"):
        Circuit.from_mib(tmp_path / "none.json")


def test_a_planted_circuit_is_faithful_complete_and_minimal(found: Any) -> None:
    wb, task, circuit = found
    for ablation in ("counterfactual", "mean"):
        result = workbench.circuit_faithfulness(
            wb, circuit.top(3), task, n_subsets=2, minimality=True, ablation=ablation, progress=False
        )
        if ablation == "counterfactual":
            assert result.value == pytest.approx(1, abs=0.05)
            assert max(result.incompleteness) < 0.05
            assert min(result.minimality.values()) > 0.9
            assert set(result.minimality) == {"a0.h1", "a1.h2"}
        assert result.interval[0] <= result.value <= result.interval[1]
    nodes = circuit.with_nodes(["L0H1", "L1H2"])
    assert workbench.circuit_faithfulness(wb, nodes, task, progress=False).value == pytest.approx(1, abs=0.05)


def test_every_share_has_an_interval(found: Any) -> None:
    wb, task, circuit = found
    measured = workbench.circuit_faithfulness(wb, circuit, task, n_subsets=2, minimality=True, progress=False)
    table = measured.table
    assert set(table["quantity"]) == {"faithfulness", "incompleteness", "minimality"}
    assert bool((table["low"] <= table["high"]).all())
    inside = (table["low"] <= table["value"] + 1e-9) & (table["value"] <= table["high"] + 1e-9)
    assert bool(inside[table["quantity"] != "incompleteness"].all())  # a magnitude near 0 is mostly larger when drawn


def test_curves_follow_mibs_definition(grouped: Any) -> None:
    wb, task, circuits = grouped
    circuit = circuits["eap"]
    curve = workbench.faithfulness_curve(wb, circuit, task, progress=False)
    assert curve.sizes == tuple(int(f * circuit.graph.n_edges) for f in MIB_FRACTIONS)
    assert curve.absolute[-1] == pytest.approx(1)
    by_hand = 0.0
    for i in range(9):
        step = MIB_FRACTIONS[i + 1] - MIB_FRACTIONS[i]
        by_hand += step * (curve.signed[i] + curve.signed[i + 1]) / 2
    assert curve.cpr == pytest.approx(by_hand)
    one = workbench.circuit_faithfulness(wb, circuit.top(curve.sizes[6]), task, progress=False)
    assert curve.absolute[6] == pytest.approx(one.value)
    # A perfect circuit scores .999, because the area begins at the first fraction.
    assert area(MIB_FRACTIONS, [1.0] * 10) == pytest.approx(0.999)
    by_nodes = workbench.faithfulness_curve(wb, circuits["ablation"], task, fractions=(0.5, 1.0), progress=False)
    assert by_nodes.absolute[-1] == pytest.approx(1)
    with pytest.raises(InterventionError, match="fractions rise"):
        workbench.faithfulness_curve(wb, circuit, task, fractions=(0.5, 0.1))


def test_auroc_is_that_of_a_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (30,), generator=generator).double()
    real = torch.rand(30, generator=generator) < 0.4
    wins = [float(a > b) + 0.5 * float(a == b) for a in scores[real] for b in scores[~real]]
    assert rank_auroc(scores, real) == pytest.approx(sum(wins) / len(wins))


def test_auroc_needs_some_in_and_some_out(found: Any) -> None:
    with pytest.raises(InterventionError, match="some must be in"):
        auroc(found[2], [])


def test_stability_counts_how_often_each_is_in(found: Any) -> None:
    stable = workbench.circuit_stability(found[2].top(3), n_bootstrap=20)
    assert dict(zip(stable.table["item"], stable.table["frequency"], strict=True)) == dict.fromkeys(INDUCTION_EDGES, 1)
    assert float(stable.jaccard.min()) == 1
    by_group = workbench.circuit_stability(found[2].top(3), n_bootstrap=5, groups=[0, 0, 1, 1, 2, 2])
    assert by_group.unit == "groups"
    with pytest.raises(InterventionError, match="labels"):
        workbench.circuit_stability(found[2], groups=[1])


def test_an_empty_circuit_and_one_of_another_model(found: Any, grouped: Any) -> None:
    wb, task, circuit = found
    with pytest.raises(InterventionError, match="empty"):
        workbench.circuit_faithfulness(wb, circuit.top(0), task)
    with pytest.raises(InterventionError, match="another model"):
        workbench.circuit_faithfulness(wb, grouped[2]["eap"], task)


def test_bad_tasks_are_named() -> None:
    with workbench.attach(tiny("gpt2"), Words()) as wb:
        good = {"answers": [" w5"], "wrong": [" w6"]}

        def find(prompt: str, twin: str, metric: Any = "logit_diff", stages: Any = None, **given: Any) -> None:
            workbench.find_circuit(
                wb, from_prompts([prompt], [twin], **{**good, **given}), metric=metric, stages=stages, progress=False
            )

        with pytest.raises(InterventionError, match="read at several tokens") as caught:
            find("w4 w4 w3", "w4 w5 w3", answers=[" w5 w6"], stages=[workbench.Stage("logits", "end")])
        assert 'Stage(positions="scored")' in str(caught.value)
        with pytest.raises(TaskError, match="cannot tell clean from corrupted: it is 1 on the prompts and 1"):
            find("w4 w4 w3", "w4 w5 w3", metric=lambda output, batch: torch.ones(1))
        with pytest.raises(TaskError, match="no metric"):
            find("w4 w4 w3", "w4 w5 w3", metric="banana")
        with pytest.raises(TaskError, match="expected one real number"):
            find("w4 w4 w3", "w4 w5 w3", metric=lambda output, batch: torch.ones(3))
        with pytest.raises(InterventionError, match="no method"):
            workbench.find_circuit(wb, random_task(2, 5, 60), "banana")
        with pytest.raises(TaskError, match="`task` is a list, and no Task"):
            workbench.find_circuit(wb, ["a prompt"])  # type: ignore[arg-type]


def test_twins_of_other_tokens() -> None:
    class Splitting(Words):
        """Makes two tokens of w9, and the same of w7 and w8."""

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": super().__call__(text.replace("w9", "w5 w5").replace("w8", "w7"))["input_ids"]}

    with workbench.attach(tiny("gpt2"), Splitting()) as wb:
        for twin, says in (("w4 w9", "its twin 3"), ("w4 w8", "does not differ")):
            task = from_prompts(["w4 w7"], [twin], [" w5"], [" w6"])
            with pytest.raises(TaskError, match=says):
                workbench.find_circuit(wb, task, progress=False)


def test_nothing_is_left_on_the_model(found: Any) -> None:
    wb, task, _ = found
    hooks = [m for m in wb.model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__]
    assert hooks == []
    before = wb.model(torch.tensor([[1, 2, 3]])).logits.detach()
    with pytest.raises(ZeroDivisionError):
        workbench.find_circuit(wb, task, metric=lambda output, batch: 1 / 0, progress=False)
    hooks = [m for m in wb.model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__]
    assert hooks == []
    assert torch.equal(before, wb.model(torch.tensor([[1, 2, 3]])).logits)
    assert math.isfinite(float(before.sum()))
