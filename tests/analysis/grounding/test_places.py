"""Which token is which patch: proved with pictures in which one patch is changed."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from support import sight
from support.sight import SIGHTS, Sight
from workbench.analysis.grounding import proof
from workbench.analysis.grounding.proof import prove, unmixed
from workbench.errors import WorkbenchError

sights = pytest.mark.parametrize("one", SIGHTS, ids=lambda one: one.name)


def spots(places: workbench.ImagePlaces) -> Iterator[tuple[int, Tensor]]:
    """Of some tiles of each picture, a patch with its box."""
    for tile in places.tiles:
        there = (tile.positions >= 0).nonzero().tolist()
        for row, column in there[:: max(1, len(there) // 2)][:2]:
            yield tile.picture, tile.boxes()[row, column]


@sights
def test_a_bright_patch_changes_the_tokens_whose_boxes_it_touches(one: Sight) -> None:
    """A patch of the picture itself is painted; with the tower's heads off, features change where boxes say."""
    model, images = sight.built(one), sight.pictures(one)
    inputs = sight.made(model, one, images)
    with workbench.attach(model) as wb, torch.no_grad():
        places = workbench.image_places(wb, inputs, images, one.processor(), **one.settings)
        seeing = [site.name for site in wb.sites if not site.name.startswith(f"{places.stack}.")]
        tokens = (inputs["input_ids"][0] == sight.IMAGE).nonzero()[:, 0]
        assert torch.isin(places.positions, tokens).all()
        assert len(places.positions) + len(places.others) == len(tokens)
        with unmixed(model.get_submodule(name) for name in seeing):
            before = torch.cat(sight.features(model, inputs))
            for picture, box in list(spots(places))[:8]:
                x0, y0, x1, y1 = box.tolist()
                height, width = one.sizes[picture]
                left, right = max(0, round(x0 + (x1 - x0) / 4)), min(width, max(1, round(x1 - (x1 - x0) / 4)))
                top, bottom = max(0, round(y0 + (y1 - y0) / 4)), min(height, max(1, round(y1 - (y1 - y0) / 4)))
                if left >= right or top >= bottom:
                    continue  # all of it is padding
                painted = [image.copy() for image in images]
                painted[picture][top:bottom, left:right] ^= 0xFF
                after = torch.cat(sight.features(model, sight.made(model, one, painted)))
                changed = set(tokens[((after - before).abs().amax(-1) > 0)].tolist())
                within, near = set(), set()
                for tile in places.tiles:
                    if tile.picture != picture or tile.box is None:
                        continue
                    boxes, positions = tile.boxes(), tile.positions
                    # A filter reaches three source pixels, or three of the smaller picture's.
                    reach = 3.5 * max(1.0, *((boxes[0, 0, 2:] - boxes[0, 0, :2]) / 4).tolist())
                    for by, found in ((0.0, within), (reach, near)):
                        hit = (boxes[..., 0] < right + by) & (boxes[..., 2] > left - by)
                        hit &= (boxes[..., 1] < bottom + by) & (boxes[..., 3] > top - by)
                        found |= set(positions[hit & (positions >= 0)].tolist())
                own = {p for p in within if overlap(places, p, (left, top, right, bottom)) > 0.1}
                assert own <= changed <= near, (one.name, picture, box.tolist())


def overlap(places: workbench.ImagePlaces, position: int, spot: tuple[int, int, int, int]) -> float:
    """The share of a patch's box that a spot covers."""
    found = places.tile_of(position)
    assert found is not None
    x0, y0, x1, y1 = places.tiles[found[0]].boxes()[found[1], found[2]].tolist()
    wide = max(0.0, min(x1, spot[2]) - max(x0, spot[0]))
    high = max(0.0, min(y1, spot[3]) - max(y0, spot[1]))
    return wide * high / ((x1 - x0) * (y1 - y0))


@sights
def test_one_changed_patch_changes_its_own_feature_alone(one: Sight) -> None:
    model = sight.built(one)
    inputs = sight.made(model, one, sight.pictures(one))
    with workbench.attach(model) as wb:
        prove(wb, inputs, probes=6)


def test_a_model_of_an_unknown_type_is_proved_once_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    one = next(each for each in SIGHTS if each.name == "llava")
    model, times = sight.built(one), []
    inputs = sight.made(model, one, sight.pictures(one))
    monkeypatch.setattr(proof, "PROVED", frozenset())
    monkeypatch.setattr(proof, "prove", lambda wb, given: times.append(prove(wb, given, probes=2)))
    with workbench.attach(model) as wb:
        first, second = (workbench.image_places(wb, inputs) for _ in range(2))
    assert len(times) == 1
    assert torch.equal(first.positions, second.positions)


def test_a_layout_that_is_not_the_models_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = next(each for each in SIGHTS if each.name == "llava")
    model = sight.built(one)
    inputs = sight.made(model, one, sight.pictures(one))
    monkeypatch.setattr(proof, "PROVED", frozenset())
    with workbench.attach(model) as wb:
        with monkeypatch.context() as turned:
            lay_out = proof.lay_out

            def wrong(*args: Any) -> Any:
                laid = lay_out(*args)
                return replace(laid, grids=[replace(grid, features=grid.features.flip(1)) for grid in laid.grids])

            turned.setattr(proof, "lay_out", wrong)
            with pytest.raises(WorkbenchError, match="does not lay pictures out as was read: row 0, column 0"):
                workbench.image_places(wb, inputs)
        monkeypatch.delattr(type(model), "get_image_features")
        with pytest.raises(WorkbenchError, match="cannot be proved: it has no get_image_features"):
            workbench.image_places(wb, inputs)
