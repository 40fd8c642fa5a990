"""Weights over images are those of the capture, and image, head and patch are chosen for all views."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Page

from support.browser import WatchedPage
from support.every_view import capture, image_capture
from workbench import attach
from workbench.errors import ReportError, WorkbenchError
from workbench.models import examples, load
from workbench.views import image_attention as made

ERROR = 0.004  # of 8 bits after a square root


def test_weights_are_those_of_the_capture() -> None:
    cap, pixels = image_capture()
    spec = made(cap, pixels).spec
    dense = torch.stack([call.pattern.dense() for call in cap.calls[0]], 1).flatten(1, 2)  # [image, head, query, key]
    held = (spec.blocks["weights"].astype(np.float64) / 255) ** 2
    assert np.abs(held - dense.numpy()).max() < ERROR
    np.testing.assert_allclose(spec.blocks["received"], dense[:, :, 1:].mean(2), atol=1e-6)
    assert spec.facts["every"]
    assert spec.facts["grid"] == [3, 3]
    table = made(cap, pixels).data()
    np.testing.assert_allclose(table["largest from CLS"], dense[:, :, 0, 1:].amax(-1).flatten(), atol=ERROR)


def test_pixels_keep_their_order_and_range() -> None:
    cap, pixels = image_capture()
    shown = made(cap, pixels).spec.blocks["pixels"]
    assert shown.shape == (3, 12, 12, 1)
    assert (shown.min(), shown.max()) == (0, 255)
    assert (np.diff(shown.astype(int).ravel()) >= 0).all()
    coloured = made(cap, pixels.expand(-1, 3, -1, -1)).spec.blocks["pixels"]
    assert coloured.shape[-1] == 3
    large = torch.nn.functional.interpolate(pixels, (600, 300))
    assert made(cap, large).spec.blocks["pixels"].shape == (3, 224, 112, 1)
    assert (np.diff(made(cap, pixels.bfloat16()).spec.blocks["pixels"].astype(int).ravel()) >= 0).all()


def test_several_forwards_stand_below_each_other() -> None:
    model, _ = load("demo-vit")
    pixels = examples().pixel_values[:3]
    with attach(model) as wb, torch.no_grad():
        with wb.capture() as parts:
            model(pixel_values=pixels[:2])
            model(pixel_values=pixels[2:])
        with wb.capture() as whole:
            model(pixel_values=pixels)
    one, two = (made(cap, pixels).spec.blocks["weights"].astype(int) for cap in (parts, whole))
    assert np.abs(one - two).max() <= 1  # the last bit of a forward over other batches


def test_too_many_weights_leave_the_prefix_only(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[made.__module__]
    cap, pixels = image_capture()
    monkeypatch.setattr(module, "CELLS", 1000)
    spec = made(cap, pixels).spec
    assert spec.blocks["weights"].shape == (3, 4, 1, 10)
    assert not spec.facts["every"]
    assert "only those from the tokens before the patches" in spec.notes[-1]
    monkeypatch.setattr(module, "CELLS", 100)
    with pytest.raises(ReportError, match="too much for one view"):
        made(cap, pixels)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": torch.zeros(2, 1, 12, 12)}, "holds 3 images, not 2"),
        ({"images": torch.zeros(3, 2, 12, 12)}, "one or three channels"),
        ({"images": torch.full((3, 1, 12, 12), torch.nan)}, "not finite"),
        ({"labels": ["a"]}, "3 images and 1 labels"),
        ({"grid": (2, 3)}, "does not match 10 tokens"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], said: str) -> None:
    cap, pixels = image_capture()
    with pytest.raises(WorkbenchError, match=said):
        made(cap, **{"images": pixels, **change})
    with pytest.raises(ReportError, match="no patches"):
        made(capture(), pixels)


def opened(watched: WatchedPage, folder: Path, address: str = "") -> Page:
    cap, pixels = image_capture()
    view = made(cap, pixels, labels=("one", "two", "three"))
    watched.page.goto(Path(view.to_html(folder / "images.html")).as_uri() + address)
    watched.page.wait_for_selector("html[data-ready]")
    return watched.page


@pytest.mark.browser
def test_image_head_and_patch_are_chosen_and_followed(page: WatchedPage, tmp_path: Path) -> None:
    tab = opened(page, tmp_path, "#L0H1,q=5,x=2")
    assert tab.locator(".detail h3").inner_text() == "L0H1 on image three, from the patch in row 1, column 1"
    tab.locator(".tile", has_text="L1H0").click()
    tab.locator(".tile", has_text="two").click()
    assert tab.evaluate("location.hash") == "#L1H0,q=5,x=1"
    tab.get_by_label("Weights from").select_option("cls")
    assert tab.evaluate("location.hash") == "#L1H0,q=0,x=1"
    tab.locator(".detail canvas").focus()
    tab.keyboard.press("End")
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash") == "#L1H0,q=6,x=1"
    page.assert_clean()


@pytest.mark.browser
def test_what_is_said_of_a_patch_is_its_weight(page: WatchedPage, tmp_path: Path) -> None:
    tab = opened(page, tmp_path, "#L1H1,q=4,x=1")
    dense = image_capture()[0].calls[0][1].pattern.dense()
    tab.locator(".detail canvas").focus()
    for key, cell in (("Home", (1, 0)), ("ArrowDown", (2, 0)), ("End", (2, 2))):
        tab.keyboard.press(key)
        said = tab.locator(".status").inner_text()
        assert "from the patch in row 1, column 0" in said
        assert f"row {cell[0]}, column {cell[1]}:" in said
        value = dense[1, 1, 4, 1 + 3 * cell[0] + cell[1]].item()
        assert float(said.rpartition(": ")[2]) == pytest.approx(value, abs=ERROR)
    tab.keyboard.press("r")
    received = dense[1, 1, 1:].mean(0)[1 + 3 * 2 + 2].item()
    assert float(tab.locator(".status").inner_text().rpartition(": ")[2]) == pytest.approx(received, abs=1e-5)
    page.assert_clean()
