"""The saliency map shows the numbers it was given, the correlation of the chosen heads, and plays the sound."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Locator, Page

from support.browser import WatchedPage
from support.comparisons import comparison
from workbench.analysis.cross_attention.correlate import correlate
from workbench.errors import ReportError
from workbench.views import SaliencyMap, saliency_map
from workbench.views.results.cross_attention import maps

BARE = ["a", "b"]


def small(**changes: Any) -> SaliencyMap:
    held: dict[str, Any] = {
        "maps": {"saliency": np.arange(2 * 6 * 3.0).reshape(2, 6, 3)},
        "tokens": BARE,
        "spectrogram": np.ones((6, 3)),
        "attention": np.full((1, 2, 2, 3), 1 / 3),
    }
    return saliency_map(**(held | changes))


# What the spec holds


def test_cells_are_kept_within_their_stated_error() -> None:
    random = np.random.default_rng(0).normal(size=(2, 6, 3))
    view = small(maps={"saliency": random})
    about = view.spec.facts["maps"][0]
    assert about["signed"]
    low, high = about["cells"]["low"], about["cells"]["high"]
    found = low + view.spec.blocks["cells0"] / 65535 * (high - low)
    np.testing.assert_allclose(found, random, atol=(high - low) / 131070 * 1.001)


def test_strips_are_the_largest_cell_of_each_position() -> None:
    view = small()
    expected = np.arange(36.0).reshape(2, 3, 2, 3).max((2, 3))
    np.testing.assert_array_equal(view.spec.blocks["strip0"], expected)
    assert view.spec.facts["step"] == 2
    assert view.spec.facts["unit"] == "frame"


def test_given_strips_win() -> None:
    strip = np.array([[1.0, 2, 3], [3, 2, 1]])
    np.testing.assert_array_equal(small(strips={"saliency": strip}).spec.blocks["strip0"], strip)


def test_an_odd_number_of_frames_fits_the_positions_that_cover_it() -> None:
    view = small(maps={"saliency": np.arange(10.0).reshape(2, 5, 1)}, spectrogram=np.ones((5, 1)))
    np.testing.assert_array_equal(view.spec.blocks["strip0"], [[1, 3, 4], [6, 8, 9]])


def test_too_many_cells_are_cut_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["workbench.views.saliency_map.view"], "CELLS", 20)
    view = small(attention=np.random.default_rng(0).random((1, 4, 2, 3)))
    assert view.spec.blocks["cells0"].shape == (2, 3, 3)
    assert view.spec.blocks["attention"].shape == (1, 1, 2, 3)
    assert view.spec.facts["attention"]["heads"] == 0
    assert any("largest of every 2 frames" in note for note in view.spec.notes)
    assert any("mean of the heads" in note for note in view.spec.notes)


def test_the_table_says_where_rows_peak_and_how_they_correlate() -> None:
    found = comparison(1)
    held = found.maps[0]
    table = maps(found).data()
    mean = held["attention"].mean((0, 1))
    for i, row in enumerate(table.itertuples(index=False)):
        assert row[2] == pytest.approx(0.02 * int(mean[i].argmax()))
    rows = table["r of attention and input saliency"]
    for i in range(3):
        assert rows[i] == pytest.approx(correlate(mean[i : i + 1], held["pooled_input_saliency"][i : i + 1]), abs=1e-6)


def test_a_constant_row_has_no_correlation() -> None:
    assert np.isnan(small().data()["r of attention and saliency"]).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": []}, "nothing to show"),
        ({"maps": {}}, "nothing to show"),
        ({"tokens": ["a"]}, "does not fit 1 tokens"),
        ({"maps": {"saliency": np.full((2, 3), np.nan)}}, "not finite"),
        ({"maps": {"saliency": np.ones((2, 4))}}, "have 3, 4 positions"),
        ({"maps": {"saliency": np.ones((2, 7, 3))}}, "does not fit"),
        ({"attention": np.ones((2, 2, 3))}, "4 axes"),
        ({"layers": [0, 1]}, "2 layers for 1"),
        ({"special": [True]}, "do not fit"),
        ({"spans": {"said": np.zeros((3, 2))}}, "spans of said"),
        ({"errors": {"other": np.zeros((2, 3))}}, "other does not fit"),
        ({"audio": np.zeros(100)}, "sampling_rate is None"),
        ({"audio": np.zeros(0), "sampling_rate": 8000}, "audio is empty"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ReportError, match=said):
        small(**changes)


def test_only_a_page_with_sound_may_play_some() -> None:
    assert "media-src" not in str(small().to_html())
    with_sound = str(small(audio=np.zeros(100) + 0.5, sampling_rate=8000).to_html())
    assert "media-src data: blob:" in with_sound


def test_pictures_without_attention_or_spectrogram() -> None:
    for view in (
        small(attention=None),
        saliency_map({"saliency": np.eye(2)}, BARE, position_texts=["x", "y"]),
        saliency_map({"saliency": -np.eye(2)}, BARE),
    ):
        found = view.to_png()
        assert isinstance(found, bytes)
        assert found.startswith(b"\x89PNG")


# In the browser


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    path = Path(maps(comparison(1)).to_html(tmp_path / "map.html"))
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900})
    watched = WatchedPage(context.new_page())
    opened = watched.open(path)
    opened.wait_for_selector("html[data-ready]")
    yield opened
    watched.assert_clean()
    context.close()


def chooser(page: Page, label: str) -> Locator:
    return page.locator(".field", has=page.get_by_text(label, exact=True)).locator("select").first


def cell(page: Page, panel: int, row: int, share: float) -> tuple[float, float]:
    """Where a row of a panel lies on the screen; panel 0 is the spectrogram."""
    box = page.locator(".stage canvas").bounding_box()
    assert box is not None
    left, width, row_height = (
        float(page.locator(".stage canvas").get_attribute(f"data-{name}") or 0) for name in ("left", "width", "row")
    )
    tops = page.evaluate("JSON.parse(document.querySelector('.stage canvas').dataset.rows)")
    return box["x"] + left + share * width, box["y"] + tops[panel] + (row + 0.5) * row_height


@pytest.mark.browser
def test_hover_says_the_values_of_the_result(page: Page) -> None:
    held = comparison(1).maps[0]
    page.mouse.move(*cell(page, 2, 1, 7.5 / 20))
    said = page.locator(".status").text_content() or ""
    assert said.startswith("“two” (1), 0.14 to 0.16 s")
    weight, value = held["attention"].mean((0, 1))[1, 7], held["pooled_input_saliency"][1, 7]
    assert f"{float(weight):.4f}"[:5] in said
    assert f"{float(value):.4f}"[:5] in said


@pytest.mark.browser
@pytest.mark.parametrize(("choice", "aggregate"), [("all", 6), ("0", 4), ("1:0", 2), ("alignment", 7)])
def test_the_correlation_is_that_of_the_result(page: Page, choice: str, aggregate: int) -> None:
    chooser(page, "Attention").select_option(choice)
    said = page.locator(".stage canvas").get_attribute("aria-label") or ""
    expected = float(comparison(1).correlations[0, aggregate, 0, 0])
    assert f"; r {expected:.2f} without special tokens" in said
    chooser(page, "Compared with").select_option(label="encoder-output saliency")
    said = page.locator(".stage canvas").get_attribute("aria-label") or ""
    assert f"; r {float(comparison(1).correlations[0, aggregate, 1, 0]):.2f} " in said


@pytest.mark.browser
def test_heads_and_tokens_follow_the_shared_selection(page: Page) -> None:
    page.evaluate("location.hash = '#L1H0,t=1'")
    page.wait_for_function("() => document.querySelector('.stage canvas').getAttribute('aria-label').includes('L1H0')")
    said = page.locator(".stage canvas").get_attribute("aria-label") or ""
    assert "L1H0" in said
    assert "over the spectrogram: two" in said
    assert chooser(page, "Attention").input_value() == "1:0"
    page.evaluate("location.hash = '#L1H0,s=elsewhere'")
    mean = "document.querySelector('.stage canvas').getAttribute('aria-label').includes('mean of all heads')"
    page.wait_for_function(f"() => {mean}")


@pytest.mark.browser
def test_a_click_chooses_a_token_and_a_second_one_takes_it_back(page: Page) -> None:
    for expected in ("t=1", ""):
        page.mouse.click(*cell(page, 1, 1, 0.5))
        assert page.evaluate("location.hash").removeprefix("#") == expected
    page.get_by_role("option", name="two").click()
    assert page.evaluate("location.hash") == "#t=1"


@pytest.mark.browser
def test_keys_reach_the_spectrogram(page: Page) -> None:
    page.locator(".stage canvas").focus()
    for key in ("ArrowDown", "ArrowUp", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    assert "mel channel 1" in (page.locator(".status").text_content() or "")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    assert "“one” (0), 0.38 to 0.4 s" in (page.locator(".status").text_content() or "")


@pytest.mark.browser
def test_the_sound_is_as_long_as_its_samples(page: Page) -> None:
    page.wait_for_function("() => document.querySelector('audio').readyState >= 1")
    assert page.evaluate("document.querySelector('audio').duration") == pytest.approx(0.4)


@pytest.mark.browser
def test_play_begins_at_the_chosen_token(page: Page) -> None:
    page.wait_for_function("() => document.querySelector('audio').readyState >= 1")
    page.evaluate("HTMLMediaElement.prototype.play = function () { window.began = this.currentTime; }")
    page.get_by_role("option", name="two").click()
    page.get_by_role("button", name="Play “two”").click()
    begin = float(comparison(1).alignments[0]["attention"][1, 0]) * 0.02
    assert page.evaluate("window.began") == pytest.approx(begin, abs=1e-3)


def test_tensors_are_taken_as_they_are() -> None:
    view = saliency_map({"saliency": torch.eye(2, dtype=torch.float64)}, BARE)
    np.testing.assert_array_equal(view.spec.blocks["strip0"], np.eye(2))
