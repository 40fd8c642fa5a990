"""The demonstration vision-language model: its card, and that it looks at what it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from workbench.errors import WorkbenchError
from workbench.models import card, load
from workbench.models import loading as loading_module
from workbench.models.train_demo_vlm import HELD_OUT, accuracy, new_model, new_tokenizer, train
from workbench.tasks import PlantedObjects, planted_objects

FOLDER = Path(loading_module.__file__).parent / "shipped" / "demo-vlm"
POINTS = ("L1H1",)


def pointing(model: Any, tokenizer: Any, drawn: PlantedObjects, heads: Any = None) -> workbench.Pointing:
    """Whether heads point at the object that is asked for."""
    with workbench.attach(model, tokenizer) as wb:
        found = [workbench.grounding(wb, drawn.inputs(tokenizer, [i])) for i in range(len(drawn))]
    return workbench.pointing(found, drawn.boxes, heads=heads)


def test_it_is_small_and_its_card_agrees_with_the_file() -> None:
    model, tokenizer = load("demo-vlm")
    facts = card("demo-vlm")
    files = list(FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) <= 3e5
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["megabytes"] == pytest.approx((FOLDER / "model.safetensors").stat().st_size / 1e6, abs=0.001)
    assert tokenizer.decode(tokenizer("colour of the ring")["input_ids"]) == "colour of the ring"
    found = accuracy(model, tokenizer, planted_objects(1000, HELD_OUT))
    assert found == pytest.approx(facts["accuracy"]["held_out"], abs=0.003)
    assert found >= 0.9


def test_it_points_at_what_it_is_asked_for_and_a_random_one_by_chance() -> None:
    drawn = planted_objects(40, seed=HELD_OUT + 1)
    right = pointing(*load("demo-vlm"), drawn, POINTS)
    assert right.of("top_patch") >= 0.9
    assert right.of("pointing_game") >= 0.9
    assert right.of("energy") > 10
    tokenizer = new_tokenizer()
    random = pointing(new_model(seed=5).eval(), tokenizer, drawn, POINTS).table.set_index("measure")
    chance = random.loc["top_patch", "chance"]
    assert chance == pytest.approx(1 / 36)
    assert random.loc["top_patch", "low"] <= chance <= random.loc["top_patch", "high"]
    assert random.loc["energy", "mean"] == pytest.approx(1, abs=0.5)


def test_pictures_are_drawn_as_they_are_said_to_be() -> None:
    drawn = planted_objects(50, seed=3, objects=4, noise=0)
    again = planted_objects(50, seed=3, objects=4, noise=0)
    assert torch.equal(drawn.pictures, again.pictures)
    for i in range(50):
        assert len(set(drawn.all_shapes[i])) == len(set(drawn.all_colours[i])) == 4
        ground = drawn.pictures[i].flatten(0, 1).mode(0).values
        painted = (drawn.pictures[i] != ground).any(-1)
        within = torch.zeros_like(painted)
        for x0, y0, x1, y1 in drawn.all_boxes[i].int().tolist():
            within[y0:y1, x0:x1] = True
            assert x0 // 8 == (x1 - 1) // 8
            assert y0 // 8 == (y1 - 1) // 8
            rows, columns = painted[y0:y1, x0:x1].any(1), painted[y0:y1, x0:x1].any(0)
            assert rows[1:].all()
            assert columns[1:-1].all()
        assert not (painted & ~within).any()
    assert drawn.inputs(new_tokenizer(), [0, 7])["pixel_values"].shape == (2, 3, 48, 48)


@pytest.mark.parametrize("more", [{"objects": 0}, {"objects": 6}, {"cell": 7}, {"cell": 24, "objects": 5}])
def test_pictures_that_cannot_be_drawn_are_refused(more: dict[str, int]) -> None:
    with pytest.raises(WorkbenchError):
        planted_objects(2, **more)


def test_the_training_learns() -> None:
    model, tokenizer = new_model(seed=0), new_tokenizer()
    losses = train(model, tokenizer, seed=0, steps=8, batch=4)
    assert len(losses) == 1
    assert not model.training
