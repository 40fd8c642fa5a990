"""Tensor peek: numbers against NumPy, odd tensors, slices on demand, and the view in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Page

from support.browser import WatchedPage
from support.every_view import capture
from workbench.errors import ReportError
from workbench.views import of, tensor_peek
from workbench.views.base import modules
from workbench.views.base.widget import answer_of


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_statistics_are_those_of_the_finite_values() -> None:
    values = _random(3, 17, 5)
    values[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    values[1, 1, :2] = 0
    row = tensor_peek(values).data().iloc[0]
    known = values.double().numpy()
    known = known[np.isfinite(known)]
    assert (row["numbers"], row["NaN"], row["∞"], row["minus ∞"], row["zeros"]) == (255, 1, 1, 1, 2)
    assert row["share of zeros"] == pytest.approx(2 / 255)
    for name, naive in (("minimum", np.min), ("maximum", np.max), ("mean", np.mean), ("standard deviation", np.std)):
        assert row[name] == pytest.approx(naive(known), rel=1e-12)
    for level in (1, 25, 50, 75, 99):
        assert row[f"{level} %"] == pytest.approx(np.quantile(known, level / 100), rel=1e-12)


def test_the_histogram_counts_every_finite_value() -> None:
    values = _random(999)
    values[3] = torch.nan
    blocks = tensor_peek(values).spec.blocks
    counts, edges = np.histogram(values[~values.isnan()].double().numpy(), bins=64)
    assert np.allclose(blocks["edges:0"], edges)
    assert blocks["counts:0"].sum() == 998
    assert np.abs(blocks["counts:0"] - counts).sum() <= 2  # edges differ by rounding


def test_a_slice_is_exact() -> None:
    values = _random(2, 3, 5, 7).double()
    slices = tensor_peek(values).spec.blocks["slices:0"]
    assert np.array_equal(slices, values.reshape(6, 5, 7).numpy())


def test_a_large_slice_keeps_what_is_farthest_from_zero() -> None:
    values = _random(1100, 33)
    values[701, 5] = -50
    values[:3, 0] = torch.nan
    view = tensor_peek(values)
    (cells,) = view.spec.blocks["slices:0"]
    assert view.spec.facts["tensors"][0]["pooled"] == [3, 1]
    assert cells.shape == (367, 33)
    assert np.isnan(cells[0, 0])
    assert cells[701 // 3, 5] == -50
    for r in (1, 100, 366):
        part = values[3 * r : 3 * r + 3, 7].numpy()
        assert cells[r, 7] == part[np.abs(part).argmax()]
    assert "farthest from 0 of 3 × 1" in view.spec.notes[0]


def test_a_page_holds_the_first_slices_and_says_so() -> None:
    view = tensor_peek(_random(10, 8, 8), budget=3 * 8 * 8 * 8)
    assert view.spec.facts["tensors"][0]["held"] == 3
    assert "the first 3 of 10" in view.spec.notes[0]


@pytest.mark.parametrize(("rows", "columns"), [(0, 2), (2, 0), (1, 3), (3, 2)])
def test_any_slice_can_be_asked_for(rows: int, columns: int) -> None:
    values = _random(2, 3, 4, 5).double()
    index = [1, 2, 3, 4]
    question = {"ask": "slice", "tensor": 0, "index": index, "rows": rows, "columns": columns}
    told, (data,) = answer_of(tensor_peek(values), question)
    moved = np.moveaxis(values.numpy(), (rows, columns), (0, 1))
    rest = [at for axis, at in enumerate(index) if axis not in (rows, columns)]
    assert np.array_equal(np.frombuffer(data).reshape(told["shape"]), moved[:, :, rest[0], rest[1]])


@pytest.mark.parametrize(
    "wrong",
    [{"tensor": 3}, {"index": [9, 0, 0]}, {"index": [0]}, {"index": None}, {"rows": 7}, {"rows": 2, "columns": 2}],
)
def test_wrong_questions_are_refused(wrong: dict[str, Any]) -> None:
    view = tensor_peek(_random(2, 3, 4))
    with pytest.raises(ReportError):
        answer_of(view, {"ask": "slice", "tensor": 0, "index": [0, 0, 0], "rows": 1, "columns": 2, **wrong})


@pytest.mark.parametrize(
    ("thing", "shape", "maximum"),
    [
        (torch.tensor(3.5), "one number", 3.5),
        (4, "one number", 4),
        (torch.arange(7), "7", 6),
        (torch.tensor([True, False]), "2", 1),
        (torch.tensor([[1.5, -2]], dtype=torch.bfloat16), "1 × 2", 1.5),
        (torch.tensor([0.5, 2]).to(torch.float8_e4m3fn), "2", 2),
        (np.arange(6, dtype=np.uint8).reshape(2, 3), "2 × 3", 5),
        (np.arange(4.0).astype(">f8"), "4", 3),
        (torch.full((3,), 2.0), "3", 2),
        (torch.full((2, 2), torch.nan), "2 × 2", np.nan),
        (torch.zeros(0, 3), "0 × 3", np.nan),
        (torch.ones(2, 3, requires_grad=True), "2 × 3", 1),
    ],
)
def test_odd_tensors_are_shown(thing: Any, shape: str, maximum: float) -> None:
    view = tensor_peek(thing)
    row = view.data().iloc[0]
    assert row["shape"] == shape
    assert row["maximum"] == pytest.approx(maximum, nan_ok=True)
    assert view.to_png()[:4] == b"\x89PNG"


def test_complex_numbers_have_three_parts() -> None:
    table = tensor_peek(torch.tensor([3 + 4j, 0])).data()
    assert table["name"].tolist() == ["|tensor|", "Re tensor", "Im tensor"]
    assert table["maximum"].tolist() == [5, 3, 4]


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (torch.zeros(3, device="meta"), "meta device"),
        (torch.eye(3).to_sparse(), "sparse"),
        ("words", "no numbers"),
        ({}, "no tensor"),
    ],
)
def test_what_has_no_numbers_is_refused(thing: Any, said: str) -> None:
    with pytest.raises(ReportError, match=said):
        tensor_peek(thing)


def test_names_must_fit() -> None:
    with pytest.raises(ReportError, match="3 axes"):
        tensor_peek(_random(2, 2, 2), ["query", "key"])


def test_the_tensors_of_a_site_have_their_names() -> None:
    view = tensor_peek(next(iter(capture())))
    about = {one["name"]: one["axes"] for one in view.spec.facts["tensors"]}
    assert about["entropy"] == ["batch", "head", "query"]
    assert about["received"] == ["batch", "head", "key"]
    assert "transformer.h.0.attn" in view.spec.title


def test_tensors_and_arrays_have_a_view() -> None:
    assert of(torch.eye(2)).spec.kind == of(np.eye(2)).spec.kind == "tensor_peek"


@pytest.mark.usefixtures("released")
def test_the_module_is_small() -> None:
    assert len(modules.live("tensor_peek").encode()) < 50_000


def _opened(watched: WatchedPage, view: Any, folder: Path) -> Page:
    view.to_html(folder / "peek.html")
    watched.open(folder / "peek.html").wait_for_selector("html[data-ready]")
    return watched.page


@pytest.mark.browser
def test_cells_are_said_and_chosen_by_keys(page: WatchedPage, tmp_path: Path) -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    tab = _opened(page, tensor_peek(values, ["head", "query", "key"]), tmp_path)
    tile, status = tab.locator(".tile"), tab.locator(".status")
    tile.press("ArrowRight")
    assert status.inner_text() == "query 0, key 0: 0"
    tile.press("ArrowDown")
    tile.press("End")
    assert status.inner_text() == "query 1, key 3: 7"
    tab.get_by_role("spinbutton", name="head").fill("1")
    tab.get_by_role("spinbutton", name="head").press("Enter")
    tile.press("Enter")
    assert status.inner_text() == "query 1, key 3: 19"
    assert tab.evaluate("location.hash").startswith("#q=1,k=3,view-0=")  # and the slice
    page.assert_clean()


@pytest.mark.browser
def test_bars_are_said(page: WatchedPage, tmp_path: Path) -> None:
    tab = _opened(page, tensor_peek(torch.tensor([0.0, 0, 64])), tmp_path)
    bars = tab.locator("canvas").nth(1)
    bars.press("Home")
    assert tab.locator(".status").inner_text() == "0 to 1: 2 numbers"
    tab.get_by_label("Counts").select_option("log")
    bars.press("End")
    assert tab.locator(".status").inner_text() == "63 to 64: 1 number"
    page.assert_clean()


@pytest.mark.browser
def test_a_slice_that_is_not_there_is_said(page: WatchedPage, tmp_path: Path) -> None:
    tab = _opened(page, tensor_peek(_random(5, 4, 4), budget=1), tmp_path)
    tab.get_by_role("spinbutton", name="axis 0").fill("3")
    tab.get_by_role("spinbutton", name="axis 0").press("Enter")
    assert "not on this page" in tab.locator(".where").first.inner_text()
    page.assert_clean()


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_those_of_the_values(page: WatchedPage, tmp_path: Path, theme: str) -> None:
    values = torch.tensor([[-1.0, 0, 1], [torch.nan, 0.5, -0.5]])
    tab = _opened(page, tensor_peek(values), tmp_path)
    tab.locator("#theme").select_option(theme)
    tab.locator(f".workbench[data-theme={theme}]").wait_for()
    found = tab.evaluate(
        """() => {
            const canvas = document.querySelector(".tile");
            const pen = canvas.getContext("2d");
            const at = (x, y) => [...pen.getImageData(x * canvas.width, y * canvas.height, 1, 1).data];
            return [[1 / 6, 0.25], [0.5, 0.25], [5 / 6, 0.25], [1 / 6, 0.75]].map(([x, y]) => at(x, y).slice(0, 3));
        }"""
    )
    low, middle, high, unseen = found
    assert low[2] > low[0]
    assert high[0] > high[2]
    assert max(middle) - min(middle) < 12
    assert unseen == ([230, 233, 237] if theme == "light" else [42, 47, 54])
    page.assert_clean()
