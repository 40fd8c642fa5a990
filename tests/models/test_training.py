"""The training script's parts: formats, the split, the loop on a tiny model, and going on after an interruption."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.errors import WorkbenchError
from workbench.models.train_demo_lm import CURRICULA, N_CTX, make_card, new_model, save_finished
from workbench.models.training.formats import FORMATS, held_out, to_tensors
from workbench.models.training.loop import Stage, Trainer
from workbench.models.training.vocabulary import build_tokenizer, vocabulary
from workbench.tasks import pieces
from workbench.tasks.colored_objects import COLOURS, OBJECTS

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch 2.9 or later")
WORDS = sorted(word for word in vocabulary() if not word.startswith("<"))
TINY = (Stage("tiny", {"lookups": 4, "ioi": 8}, steps=12, shifted=("lookups",), decay=True),)


def _trainer(folder: Path | None, **options: Any) -> Trainer:
    tokenizer = build_tokenizer(N_CTX)
    model = new_model(len(tokenizer), 0, n_layer=1, n_head=2, d_model=16)
    settings = {"seed": 1, "warmup": 2, "every": 6, "n_eval": 4}
    return Trainer(model, tokenizer, TINY, folder, **(settings | options))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_rows_use_known_words_and_fit_the_context(name: str) -> None:
    known = vocabulary()
    for row, learn in FORMATS[name](50, random.Random(0), WORDS):
        assert set(row) <= set(known)
        assert len(row) <= N_CTX
        assert learn
        assert max(learn) < len(row) - 1


def _scene_colours(row: list[str], end: int) -> dict[str, str]:
    """Colour of each thing told before a place; a later scene overrides an earlier one."""
    told = pairwise(row[:end])
    return {thing: colour for colour, thing in told if colour in COLOURS and thing in OBJECTS}


@pytest.mark.parametrize(("name", "back"), [("lookups", 0), ("scenes", 4), ("full_prompts", 4)])
def test_learnt_answers_are_the_colours_of_the_things_asked_for(name: str, back: int) -> None:
    for row, learn in FORMATS[name](50, random.Random(1), WORDS):
        for place in learn:
            assert row[place + 1] == _scene_colours(row, place)[row[place - back]].capitalize()


@pytest.mark.parametrize("name", ["repeats", "short_repeats"])
def test_learnt_words_of_repeats_stood_before(name: str) -> None:
    for row, learn in FORMATS[name](5, random.Random(2), WORDS):
        half = len(row) // 2
        assert all(row[place + 1] == row[place + 1 - half] for place in learn)


def test_training_prompts_share_no_combination_with_the_held_out_ones() -> None:
    tasks = held_out(300, seed=0)
    objects = {frozenset(pieces(p)[i] for i in (42, 46, 51)) for p in tasks["colored_objects"].prompts}
    for row, _ in FORMATS["full_prompts"](300, random.Random(3), WORDS):
        assert frozenset(row[i] for i in (10, 14, 19)) not in objects
        assert frozenset(row[i] for i in (42, 46, 51)) not in objects
    years = set(tasks["greater_than"].prompts)
    assert not any(" ".join(row[:-1]) in years for row, _ in FORMATS["years"](300, random.Random(3), WORDS))


def test_labels_sit_one_place_early() -> None:
    inputs, labels = to_tensors([(["a", "b", "c"], [1]), (["b"], [])], {"a": 5, "b": 6, "c": 7})
    assert inputs.tolist() == [[5, 6, 7], [6, 0, 0]]
    assert labels.tolist() == [[-100, 7, -100], [-100, -100, -100]]


@pytest.mark.parametrize("name", sorted(CURRICULA))
def test_curricula_name_formats_and_goals_that_exist(name: str) -> None:
    for stage in CURRICULA[name]:
        assert set(stage.mixture) <= set(FORMATS)
        assert set(stage.shifted) <= set(stage.mixture)
        if stage.goal:
            assert stage.goal[0] in {f"train/{one}" for one in stage.mixture} | set(held_out(1, 0))


@needs_muon
def test_loss_falls_on_a_tiny_model() -> None:
    history = _trainer(None).run().history
    assert [entry["step"] for entry in history] == [6, 12]
    assert history[-1]["loss"] < history[0]["loss"]


@needs_muon
def test_interrupted_run_resumes_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _trainer(None)
    whole.run()

    broken = _trainer(tmp_path)
    step: Callable[[Stage], dict[str, float]] = broken._step

    def interrupt(stage: Stage) -> dict[str, float]:
        if broken.progress.step == 8:
            raise KeyboardInterrupt
        return step(stage)

    monkeypatch.setattr(broken, "_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        broken.run()

    resumed = _trainer(tmp_path)
    resumed.resume()
    assert resumed.progress.step == 6
    resumed.run()
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@needs_muon
def test_resume_refuses_a_missing_checkpoint_and_another_seed(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="no checkpoint"):
        _trainer(tmp_path).resume()
    _trainer(tmp_path).save()
    with pytest.raises(WorkbenchError, match="seed 1"):
        _trainer(tmp_path, seed=2).resume()


@needs_muon
def test_finished_folder_holds_half_precision_weights_and_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import safe_open

    monkeypatch.setattr("workbench.models.train_demo_lm.N_CARD", 10)
    trainer = _trainer(None)
    save_finished(trainer.model, trainer.tokenizer, tmp_path / "model")
    card = make_card(tmp_path / "model", trainer.progress, "demo", seed=1)
    assert json.loads((tmp_path / "model" / "card.json").read_text(encoding="utf-8")) == card
    assert set(card["accuracy"]) == set(held_out(1, 0))
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as weights:
        assert all(weights.get_tensor(key).dtype == torch.float16 for key in weights.keys())  # noqa: SIM118
    assert trainer.model.dtype == torch.float32


def test_new_model_is_the_same_for_a_seed_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    one, two, other = (new_model(50, seed, n_layer=1, n_head=2, d_model=8) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
