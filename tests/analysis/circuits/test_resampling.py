"""Resample ablation of circuits: other prompts, on real positions, several times, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import workbench
from support.circuits import Words, random_task, task_for, tiny
from workbench.analysis.circuits.engine.donors import donors_of
from workbench.analysis.circuits.engine.setup import open_setup
from workbench.analysis.circuits.patching import ablate_heads
from workbench.errors import InterventionError
from workbench.session.resampling import Content, aligned, choose_donors
from workbench.tasks import from_inputs


def contents(*rows: list[int]) -> list[Content]:
    return [Content.of([torch.tensor(row)]) for row in rows]


def test_donors_are_others_of_the_nearest_length() -> None:
    pool = contents([1, 2, 3], [1, 2, 4], [1, 2, 3], [5, 6], [1, 2, 3, 4, 5], [7, 8, 9, 1])
    chosen = choose_donors(pool, pool, seed=0, draws=3)
    assert all(pool[j].digest != pool[i].digest for i, js in enumerate(chosen) for j in js)
    assert chosen[0][0] == 1  # the only other of three tokens
    assert set(chosen[0][1:]) <= {3, 5}
    assert choose_donors(pool, pool, seed=0) == choose_donors(pool, pool, seed=0)
    assert len(choose_donors(pool, pool, seed=0)[0]) == 4  # all that differ from the prompt that is there twice
    many = contents(*([i, i + 1] for i in range(40)))
    assert {len(one) for one in choose_donors(many, many, seed=0)} == {4}
    assert choose_donors(many, many, seed=0) != choose_donors(many, many, seed=1)
    with pytest.raises(InterventionError, match="no other that differs"):
        choose_donors(pool[:1], pool[:1], seed=0)
    with pytest.raises(InterventionError, match="no other that differs"):
        choose_donors(pool[:1], [pool[0], pool[2]], seed=0)


def test_donors_of_equal_length_are_equally_likely() -> None:
    pool = contents(*([i, 2 * i] for i in range(6)))
    count = torch.zeros(6)
    for seed in range(600):
        count[choose_donors(pool, pool, seed, draws=1)[0][0]] += 1
    assert count[0] == 0
    assert ((count[1:] - 120) ** 2 / 120).sum() < 18.5  # χ² with 4 degrees of freedom, p = 0.001


def test_positions_correspond_by_rank() -> None:
    own = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    donor = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]]).bool()
    assert aligned(own, donor).tolist() == [[0, 0, 2, 4, 6], [3, 6, 0, 0, 0], [4, 0, 0, 0, 0]]


@pytest.mark.parametrize("how", ["resample", "mean_positional", "mean"])
@pytest.mark.parametrize("name", ["llama-gqa", "t5"])
def test_effects_do_not_depend_on_batches_and_order(name: str, how: str) -> None:
    with workbench.attach(tiny(name), Words()) as wb:
        task = task_for(name, 5, lengths=2)
        whole = ablate_heads(wb, task, how, progress=False).effects
        assert whole.abs().amax((1, 2)).min() > 0
        for size in (2, 1):
            torch.testing.assert_close(ablate_heads(wb, task, how, batch_size=size, progress=False).effects, whole)
        order = [3, 0, 4, 1, 2]
        turned = type(task)(task.name, tuple(task.examples[i] for i in order), task.source)
        torch.testing.assert_close(ablate_heads(wb, turned, how, progress=False).effects, whole[..., order])


def padded(ids: torch.Tensor, mask: torch.Tensor, pad: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}


@pytest.mark.parametrize("how", ["resample", "mean_positional", "mean", "zero"])
def test_effects_do_not_depend_on_padding(how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ids, other = (torch.randint(3, 60, (4, 8), generator=generator) for _ in range(2))
    twins = ids.clone()
    twins[:, 1] = (ids[:, 1] + 1) % 57 + 3
    lengths = torch.tensor([8, 6, 5, 8])
    mask = (torch.arange(8) < lengths[:, None]).long()
    left = [
        torch.stack([row.roll(8 - int(n)) for row, n in zip(one, lengths, strict=True)]) for one in (ids, twins, mask)
    ]

    def task(a: Any, b: Any, m: Any, pad: Any) -> Any:
        return from_inputs(padded(a, m, pad), padded(b, m, pad), [7, 8, 9, 10], [11, 12, 13, 14])

    with workbench.attach(tiny("llama-gqa")) as wb:
        zeros, noise, on_the_left = (
            ablate_heads(wb, one, how, progress=False).effects
            for one in (task(ids, twins, mask, ids * 0), task(ids, twins, mask, other), task(*left, other))
        )
    torch.testing.assert_close(zeros, noise)
    torch.testing.assert_close(zeros, on_the_left, atol=1e-5, rtol=1e-4)  # rotary angles are float32


def test_results_say_how_often_and_of_which_seed() -> None:
    with workbench.attach(tiny("llama-gqa"), Words()) as wb:
        task = random_task(4, 6, 60)
        found = workbench.find_circuit(wb, task, "ablation", ablation="resample", seed=3, progress=False)
        assert found.provenance["resampling"] == {"draws": 3, "seed": 3}
        with open_setup(wb, task, seed=3) as setup:
            assert all(i not in js for i, js in enumerate(donors_of(setup)))
        with pytest.raises(InterventionError, match="cannot be resampled"):
            workbench.find_circuit(wb, task[:1], "ablation", ablation="resample", progress=False)
