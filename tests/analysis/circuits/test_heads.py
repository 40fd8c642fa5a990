"""Single heads: activation patching against the public interventions, roles, and repair by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import workbench
from support.circuits import Words, induction_model, mover_model, random_task, tiny
from workbench.analysis.circuits.repair import last_row_on
from workbench.errors import InterventionError, TaskError
from workbench.metrics import logit_diff


def runs(wb: Any, task: Any) -> tuple[Any, Any]:
    clean = next(iter(task.batches(wb.tokenizer, len(task))))
    twin = next(iter(task.batches(wb.tokenizer, len(task), twins=True)))
    return clean, twin


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_z_and_pattern_are_those_of_the_public_interventions(name: str, direction: str) -> None:
    task = random_task(4, 6, 60)
    with workbench.attach(tiny(name), Words()) as wb:
        clean, twin = runs(wb, task)
        into, out_of = (clean, twin) if direction == "noising" else (twin, clean)
        with torch.no_grad():
            with wb.capture(z=True) as cap:
                wb.model(**out_of)
            plain = logit_diff(wb.model(**into), clean)
            found = workbench.patch_heads(wb, task, "z", direction=direction, positions="end", progress=False)
            patterns = workbench.patch_heads(wb, task, "pattern", direction=direction, progress=False)
            for row, (layer, head) in enumerate(zip(found.layers, found.numbers, strict=True)):
                with wb.patch({(layer, head): cap[layer].z[:, :, head]}, positions=-1):
                    expected = logit_diff(wb.model(**into), clean) - plain
                assert torch.allclose(found.effects[row, 0], expected, atol=1e-9)
                weights = cap[layer].pattern.dense(heads=[head])[:, 0].double()
                with wb.edit_pattern((layer, head), lambda rows, site, h, weights=weights: weights):
                    expected = logit_diff(wb.model(**into), clean) - plain
                assert torch.allclose(patterns.effects[row, 0], expected, atol=1e-6)
        span = found.clean.mean() - found.corrupted.mean()
        sign = -1 if direction == "noising" else 1
        assert torch.allclose(found.scores, sign * found.effects.mean(-1) / span.abs())
        assert found.sign.startswith(direction)


def test_patching_all_inputs_of_a_head_is_patching_its_output() -> None:
    """With queries, keys and values of the other run, one after another, L1H2's planted key carries everything."""
    model, task = induction_model()
    with workbench.attach(model, Words()) as wb:
        scores = {a: workbench.patch_heads(wb, task, a, progress=False) for a in ("q", "k", "v", "z", "pattern")}
        at = scores["z"].heads.index("L1H2")
        assert float(scores["z"].scores[at]) == pytest.approx(1, abs=0.05)
        assert float(scores["k"].scores[at]) == pytest.approx(1, abs=0.05)
        assert float(scores["pattern"].scores[at]) == pytest.approx(1, abs=0.05)
        assert abs(float(scores["q"].scores[at])) < 0.05
        assert scores["z"].table["head"][0] in ("L1H2", "L0H1")
        by_place = workbench.patch_heads(wb, task, "z", by_position=True, progress=False)
        assert by_place.places == tuple(map(str, range(7)))
        assert float(by_place.scores[at, -1]) == pytest.approx(1, abs=0.05)
        assert abs(float(by_place.scores[at, :-1].sum())) < 1e-9


def test_kv_groups_are_patched_as_groups() -> None:
    with workbench.attach(tiny("llama-gqa"), Words()) as wb:
        found = workbench.patch_heads(wb, random_task(3, 6, 60), "k", progress=False)
        assert found.heads == ("L0KV0", "L0KV1", "L1KV0", "L1KV1")
        with pytest.raises(InterventionError, match="no activation"):
            workbench.patch_heads(wb, random_task(3, 6, 60), "banana")
        with pytest.raises(InterventionError, match="no common positions"):
            workbench.patch_heads(wb, random_task(4, 6, 60, lengths=2), by_position=True)


def test_ablation_is_that_of_the_public_intervention() -> None:
    task = random_task(4, 6, 60)
    with workbench.attach(tiny("gpt-neox"), Words()) as wb, torch.no_grad():
        clean, _ = runs(wb, task)
        plain = logit_diff(wb.model(**clean), clean)
        for how in ("zero", "mean", "mean_positional"):
            found = workbench.ablate_heads(wb, task, how, progress=False)
            for row in (0, 5):
                with wb.ablate((found.layers[row], found.numbers[row]), how, reference=dict(clean)):
                    expected = logit_diff(wb.model(**clean), clean) - plain
                assert torch.allclose(found.effects[row, 0], expected, atol=1e-9)


def test_roles_of_planted_heads() -> None:
    model, task = induction_model()
    with workbench.attach(model, Words()) as wb:
        roles = workbench.head_roles(wb, task, threshold=0.5, progress=False)
        assert roles.of("previous-token") == ("L0H1",)
        assert roles.of("induction") == ("L1H2",)
    model, task = mover_model()
    task = type(task)(task.name, task.examples, task.source, task.settings)
    with workbench.attach(model, Words()) as wb:
        examples = tuple(
            type(e)(e.prompt, e.twin, e.answers, e.wrong, {**e.positions, "answer": 1 + i % 2, "cue": 0}, e.changed)
            for i, e in enumerate(task)
        )
        named = type(task)(task.name, examples, task.source, task.settings)
        roles = workbench.head_roles(wb, named, places={"answer": ("answer",), "question": ("cue",)}, progress=False)
        assert roles.of("mover") == ("L1H0",)
        assert roles.of("content gatherer")[0] == "L0H2"
        assert float(roles.evidence["logit_diff"][roles.heads.index("L1H0")]) > 0.5
        with pytest.raises(TaskError, match="no place"):
            workbench.head_roles(wb, named, places={"banana": ("answer",)})


def test_an_edited_row_is_the_mean_of_two_values() -> None:
    with workbench.attach(tiny("gpt2"), Words()) as wb, torch.no_grad():
        inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10], [6, 6, 9, 8, 4, 3]])}
        weights = torch.zeros(2, 6)
        weights[0, [1, 3]] = 0.5
        weights[1, [2, 4]] = 0.5
        with wb.capture(z=True, values=True) as before:
            wb.model(**inputs)
        seen = []

        def edit(rows: torch.Tensor, site: Any, head: int) -> torch.Tensor:
            new = last_row_on(weights)(rows, site, head)
            seen.append(new)
            return new

        with wb.edit_pattern((1, 2), edit, queries=-1), wb.capture(z=True, values=True) as after:
            wb.model(**inputs)
        (row,) = seen
        assert row.shape == (2, 1, 6)
        assert torch.equal(row.sum(-1), torch.ones(2, 1, dtype=row.dtype))
        assert (row == 0.5).sum(-1).tolist() == [[2], [2]]
        assert (row != 0).sum(-1).tolist() == [[2], [2]]
        old, new = before[1].z, after[1].z
        values = after[1].pattern.values[:, 2]
        expected = torch.stack([values[0, [1, 3]].mean(0), values[1, [2, 4]].mean(0)])
        assert torch.allclose(new[:, -1, 2], expected, atol=1e-9)
        changed = (old != new).any(-1)
        assert changed.nonzero().tolist() == [[0, 5, 2], [1, 5, 2]]
        result = after[1].result()[:, -1, 2]
        w_o = wb.model.transformer.h[1].attn.c_proj.weight[16:24]
        assert torch.allclose(result, expected @ w_o, atol=1e-9)


def test_a_model_is_repaired_by_looking_at_the_right_place() -> None:
    """The planted mover, whose cue is lost, is right again once it is made to look at the answer."""
    model, task = mover_model()
    model.blocks[0].attn.o.weight.data.zero_()
    examples = []
    for i, e in enumerate(task):
        places = {**e.positions, "x": 1, "y": 2, "other": 2 - i % 2}
        examples.append(type(e)(e.prompt, e.twin, e.answers, e.wrong, places, e.changed))
    named = type(task)(task.name, tuple(examples), task.source, task.settings)
    with workbench.attach(model, Words()) as wb:
        found = workbench.repair(
            wb, named, ["L1H0"], towards=("x", "y"), but="other", movers=["L1H1"], n_random=4, progress=False
        )
        assert float(found.before.mean()) <= 0.5
        assert float(found.together.mean()) == 1
        assert float(found.single[0].mean()) == 1
        assert float(found.random.mean()) <= 0.5
        assert all("L1H0" not in draw and "L1H1" not in draw for draw in found.random_heads)
        assert found.broken == 0
        assert found.attention_before.shape == (1, 2, 6)
        with pytest.raises(InterventionError, match="no known positions"):
            workbench.repair(wb, named, ["L1H0"])
        with pytest.raises(InterventionError, match="no head"):
            workbench.repair(wb, named, [], towards=("x",))
        with pytest.raises(InterventionError, match="no position is left"):
            workbench.repair(wb, named, ["L1H0"], towards=("x",), but="x", progress=False)
