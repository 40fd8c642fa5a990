"""Pointing at boxes: by hand on a picture of four patches, and by chance where a map is the same everywhere."""

import numpy as np
import pytest
import torch
from torch import Tensor

import workbench
from workbench import Grounding
from workbench.analysis.grounding.pointing import MEASURES
from workbench.analysis.grounding.result import PARTS
from workbench.errors import WorkbenchError


def found(weights: Tensor, size: tuple[int, int] = (8, 12), grid: tuple[int, int] = (2, 3)) -> Grounding:
    """One head that reads a picture so."""
    rows, columns = grid
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    wide, high = size[1] / columns, size[0] / rows
    left, top = cells[:, 1] * wide, cells[:, 0] * high
    n = len(cells)
    mass = weights.sum().item()
    return Grounding(
        positions=(9,), tokens=("?",), writes=("",), labels=("L0H0",), sites=("a",), layers=(0,), heads=(0,),
        weights=weights.float().view(1, 1, n), sinks=torch.zeros(1, n, dtype=torch.bool),
        parts=PARTS, masses=torch.tensor([[[mass, 0.0, 0.0, 1 - mass]]]), sink_rule="", places=torch.arange(n),
        tile=(0,) * n, cells=cells, boxes=torch.stack([left, top, left + wide, top + high], 1), tile_names=("image 0",),
        tile_pictures=(0,), grids=torch.tensor([grid]), names=("image 0",), sizes=torch.tensor([size]),
        pictures=(torch.zeros(*size, 3, dtype=torch.uint8),), calls=1, provenance={},
    )  # fmt: skip


def test_by_hand() -> None:
    """Patches of 4 x 4 pixels; most weight on row 1, column 2, which lies at x from 8 to 12 and y from 4 to 8."""
    weights = torch.tensor([[0.1, 0.0, 0.1], [0.05, 0.15, 0.4]])
    one = found(weights)
    result = workbench.pointing(one, (6, 4, 12, 8))
    half = 0.15 / 2 + 0.4
    area = 24 / 96
    assert result.of("pointing_game") == 1
    assert result.of("top_patch") == result.of("top_patch_overlap") == 1
    assert result.of("mass") == pytest.approx(half / 0.8)
    assert result.of("energy") == pytest.approx(half / 0.8 / area)
    torch.testing.assert_close(result.chance[0], torch.tensor([24 / 96, 1 / 6, 2 / 6, area, 1.0], dtype=torch.float64))
    beside = workbench.pointing(one, (0, 0, 9, 5))
    assert beside.of("top_patch") == 0
    assert beside.of("top_patch_overlap") == 1
    assert beside.of("pointing_game") == pytest.approx(1 / 16)  # one of the largest pixels
    assert workbench.pointing(one, (0, 0, 9, 5), tolerance=3).of("pointing_game") == 1


def test_a_map_that_is_the_same_everywhere_is_chance() -> None:
    drawn = np.random.default_rng(0)
    several, boxes = [], []
    for _ in range(40):
        x, y = np.sort(drawn.uniform(0, 12, 2)), np.sort(drawn.uniform(0, 8, 2))
        boxes.append([x[0], y[0], x[1] + 1e-3, y[1] + 1e-3])
        several.append(found(torch.full((2, 3), 0.1)))
    result = workbench.pointing(several, torch.tensor(boxes))
    for name in ("pointing_game", "mass", "energy"):
        at = MEASURES.index(name)
        torch.testing.assert_close(result.values[:, at], result.chance[:, at], atol=1e-6, rtol=1e-4)


def test_random_patches_point_by_chance() -> None:
    drawn = torch.Generator().manual_seed(0)
    several = [found(torch.rand(6, generator=drawn)) for _ in range(400)]
    result = workbench.pointing(several, torch.tensor([[3.0, 0.0, 9.0, 4.0]]).expand(400, 4))
    table = result.table.set_index("measure")
    assert table.loc["top_patch", "chance"] == pytest.approx(1 / 6)
    assert table.loc["top_patch", "low"] < 1 / 6 < table.loc["top_patch", "high"]


def test_nothing_on_the_picture_is_no_number() -> None:
    result = workbench.pointing([found(torch.zeros(6)), found(torch.eye(6)[0])], torch.tensor([[0.0, 0, 4, 4]] * 2))
    assert result.values[0].isnan().all()
    assert result.of("mass") == pytest.approx(1)
    assert list(result.table["n"]) == [1] * 5


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, 13, 4]], r"lies outside of its picture of 8 x 12"),
        ([[-1, 0, 3, 4]], r"lies outside"),
        ([[4, 0, 4, 4]], r"is empty"),
        ([[0, 0, 4, 4]] * 2, r"1 examples need a box"),
    ],
)
def test_boxes_that_are_none_are_refused(boxes: list[list[float]], message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        workbench.pointing(found(torch.ones(6) / 6), boxes)


def test_it_is_kept_in_a_file(tmp_path: object) -> None:
    result = workbench.pointing(found(torch.eye(6)[2]), (0, 0, 4, 4))
    again = workbench.Pointing.load(result.save(f"{tmp_path}/p.safetensors"))
    assert torch.equal(again.values, result.values)
    assert again.table.equals(result.table)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"picture": 3}, "no picture 3"),
        ({"row": 9}, "no row 9"),
        ({"tolerance": float("nan")}, "tolerance is at least"),
    ],
)
def test_places_that_there_are_not_are_named(how: dict[str, float], said: str) -> None:
    one = found(torch.full((2, 3), 0.1))
    with pytest.raises(WorkbenchError, match=said):
        workbench.pointing(one, (0, 0, 4, 4), **how)  # type: ignore[arg-type]
    with pytest.raises(WorkbenchError, match="four numbers"):
        workbench.pointing([one, one], [(0, 0, 4, 4), (0, 0, 4)])  # type: ignore[list-item]
    with pytest.raises(WorkbenchError, match="no row 7"):
        one.top(row=7)
