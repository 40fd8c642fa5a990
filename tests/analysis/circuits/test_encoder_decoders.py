"""The public functions on encoder-decoders: text through T5 and mBART, clips through Whisper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import workbench
from support.circuits import ENCODER_DECODERS, Words, task_for, tiny
from workbench.analysis.circuits.engine.setup import open_setup
from workbench.analysis.circuits.find import METHODS
from workbench.analysis.circuits.methods.path_patching import Paths, run_paths
from workbench.errors import FormatError, InterventionError, TaskError, WorkbenchError
from workbench.inputs import decoder_start
from workbench.metrics import logit_diff
from workbench.tasks import from_inputs, from_prompts


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_heads_and_leaves_nothing_behind(name: str, method: str, tmp_path: Path) -> None:
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    task = task_for(name, 3)
    batch = next(iter(task.batches(Words(), 3, start_token=decoder_start(model))))
    with workbench.attach(model, Words()) as wb, torch.no_grad():
        plain = model(**batch, use_cache=False).logits
        circuit = workbench.find_circuit(wb, task, method, fraction=0.3, n_edges=0.5, threshold=0.1, progress=False)
        found = workbench.circuit_faithfulness(wb, circuit, task, progress=False)
        assert torch.equal(plain, model(**batch, use_cache=False).logits)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert any(head.startswith("decoder.") for head in circuit.heads)
    assert torch.isfinite(torch.tensor(found.value))
    assert workbench.Circuit.load(circuit.save(tmp_path / "circuit.safetensors")).nodes == circuit.nodes
    with pytest.raises(WorkbenchError, match="MIB's form"):
        circuit.to_mib(tmp_path / "circuit.json")


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_the_whole_graph_is_faithful(name: str) -> None:
    with workbench.attach(tiny(name), Words()) as wb:
        circuit = workbench.find_circuit(wb, task_for(name, 3), "eap", n_edges=1.0, progress=False)
        assert circuit.n_edges == circuit.graph.n_edges
        found = workbench.circuit_faithfulness(wb, circuit, task_for(name, 3), progress=False)
    assert found.value == pytest.approx(1, abs=1e-9)


def test_patched_z_is_that_of_the_public_interventions() -> None:
    task, model = task_for("mbart", 4), tiny("mbart")
    start = decoder_start(model)
    clean, twin = (next(iter(task.batches(Words(), 4, twins=twins, start_token=start))) for twins in (False, True))
    with workbench.attach(model, Words()) as wb, torch.no_grad():
        with wb.capture(z=True) as cap:
            model(**clean, use_cache=False)
        plain = logit_diff(model(**twin, use_cache=False), clean)
        found = workbench.patch_heads(wb, task, "z", progress=False)
        places = workbench.patch_heads(wb, task, "z", positions=["early", "end"], by_position=True, progress=False)
        for row, head in enumerate(found.heads):
            site, _, number = head.rpartition(".H")
            with wb.patch({head: cap[site].z[:, :, int(number)]}):
                expected = logit_diff(model(**twin, use_cache=False), clean) - plain
            assert torch.allclose(found.effects[row, 0], expected, atol=1e-9)
            assert bool(places.effects[row, 0].isnan().all()) == head.startswith("decoder.")
            assert bool(places.effects[row, 1].isfinite().all())
        every = workbench.patch_heads(wb, task, "z", by_position=True, progress=False)
        assert every.places[1] == "encoder 1"  # "early"
        assert torch.allclose(every.effects[:, 1], places.effects[:, 0], atol=1e-9, equal_nan=True)
        of = torch.tensor([[place.split()[0] == head.split(".")[0] for place in every.places] for head in every.heads])
        assert torch.equal(every.effects.isfinite().all(-1), of)
        keys = workbench.patch_heads(wb, task, "k", positions="early", progress=False)
        at = keys.heads.index("decoder.1.cross_attn.H2")
        assert bool(keys.effects[at].isfinite().all())  # keys of cross-attention stand in the prompt
    assert len(places.table) == 2 * len(found.heads)


def test_roles_and_repair_look_from_the_decoder_into_the_prompt() -> None:
    model = tiny("mbart")
    words = [(11, 12, 13, 14), (21, 22, 23, 24)]
    prompts = [" ".join(f"w{word}" for word in row) for row in words]
    twins = [" ".join(f"w{word}" for word in (row[0], row[1] + 30, *row[2:])) for row in words]
    task = from_prompts(prompts, twins, [" w5", " w6"], [" w7", " w8"], name="look", positions={"answer": 1, "b": 2})
    with workbench.attach(model, Words()) as wb:
        start = decoder_start(model)
        with torch.no_grad(), wb.capture(values=True) as cap:
            model(**next(iter(task.batches(Words(), 2, start_token=start))), use_cache=False)
        roles = workbench.head_roles(wb, task, places={"answer": ["answer"]}, progress=False)
        cross = cap["decoder.1.cross_attn"].pattern.dense()[:, :, -1, 1].double().mean(0)

        def of(site: str) -> list[int]:
            return [i for i, head in enumerate(roles.heads) if head.startswith(site)]

        assert torch.allclose(roles.evidence["to_answer"][of("decoder.1.cross_attn")], cross, atol=1e-6)
        assert bool(roles.evidence["to_answer"][of("decoder.0.attn")].isnan().all())
        assert bool(roles.evidence["previous"][of("decoder.1.cross_attn")].isnan().all())
        assert bool(roles.evidence["logit_diff"][of("encoder.")].isnan().all())
        fixed = workbench.repair(
            wb, task, ["decoder.0.cross_attn.H0"], towards=["answer", "b"], but="b",
            movers=["decoder.1.cross_attn.H0"], n_random=3, progress=False,
        )  # fmt: skip
        looks = cap["decoder.1.cross_attn"].pattern.dense()[:, 0, -1].double()
        assert torch.allclose(fixed.attention_before[0], looks[:, [2, 1]].T, atol=1e-6)

        def onto_the_answer(rows: torch.Tensor, site: object, head: int) -> torch.Tensor:
            return torch.zeros_like(rows).index_fill(-1, torch.tensor(1), 1.0)

        with torch.no_grad(), wb.edit_pattern("decoder.0.cross_attn.H0", onto_the_answer), wb.capture() as edited:
            model(**next(iter(task.batches(Words(), 2, start_token=start))), use_cache=False)
        looks = edited["decoder.1.cross_attn"].pattern.dense()[:, 0, -1].double()
        assert torch.allclose(fixed.attention_after[0], looks[:, [2, 1]].T, atol=1e-6)
        assert not torch.allclose(fixed.attention_after, fixed.attention_before)
        assert all("cross_attn" in head for draw in fixed.random_heads for head in draw)
        with pytest.raises(InterventionError, match="into the prompt"):
            workbench.repair(wb, task, ["decoder.1.attn.H0"], towards=["answer"], progress=False)


def test_bad_input_is_named() -> None:
    with workbench.attach(tiny("gpt2"), Words()) as wb, pytest.raises(TaskError, match="no encoder-decoder"):
        workbench.find_circuit(wb, task_for("mbart", 2), "eap", progress=False)
    with workbench.attach(tiny("mbart"), Words()) as wb:
        with open_setup(wb, task_for("mbart", 2)) as setup, pytest.raises(InterventionError, match="another stream"):
            run_paths(setup, Paths(("logits",), (("encoder.a0.h0",),)), progress=False)
        circuit = workbench.find_circuit(wb, task_for("mbart", 2), "eap", progress=False)
    with workbench.attach(tiny("gpt2"), Words()) as wb, pytest.raises(InterventionError, match="another model"):
        workbench.circuit_faithfulness(wb, circuit, task_for("gpt2", 2), progress=False)
    with pytest.raises(FormatError, match="no node"):
        circuit.graph.layer_of("encoder.x0")


CLIPS = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"twins": {"input_features": CLIPS[:, :, :-1]}}, "another shape"),
        ({"twins": {"pixels": CLIPS}}, "the same are needed"),
        ({"twins": {"input_features": CLIPS}}, "does not differ"),
        ({"wrong": [7, 8]}, "has the answers"),
        ({"answers": [7]}, "2 examples and 1 answers"),
        ({"positions": {"word": [1]}}, "given for 1 of 2"),
    ],
)
def test_tasks_of_tensors_that_cannot_be(change: dict[str, object], says: str) -> None:
    given = {"inputs": {"input_features": CLIPS}, "twins": {"input_features": -CLIPS}, "answers": [7, 8]}
    with pytest.raises(TaskError, match=says):
        from_inputs(**{**given, "wrong": [9, 9], **change})  # type: ignore[arg-type]
