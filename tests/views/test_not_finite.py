"""Numbers that are not finite: unknown ones are grey, infinite ones have the colour at the end of the scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from support.browser import WatchedPage
from workbench.storage import disk
from workbench.views import Axes, compare, head_atlas, head_gallery, token_strip
from workbench.views import page as pages
from workbench.views.base import scales

INF, NAN = torch.inf, torch.nan


@pytest.mark.browser
def test_infinite_values_leave_the_scale_to_the_others(page: WatchedPage, tmp_path: Path) -> None:
    strip = token_strip(["a", "b", "c", "d"], torch.tensor([1.0, NAN, INF, 0.0]))
    atlas = head_atlas(torch.tensor([[1.0, NAN, 3.0], [INF, 2.0, -1.0]]))
    path = disk.write(tmp_path / "page.html", pages.render("Not finite", [strip.spec, atlas.spec]))
    tab = page.open(path)
    tab.wait_for_selector("html[data-ready]")
    colours = tab.locator(".strip .token").evaluate_all("each => each.map((one) => one.style.backgroundColor)")
    lowest, highest = "rgb(247, 247, 244)", "rgb(26, 10, 46)"
    assert [colours[0], colours[2], colours[3]] == [highest, highest, lowest]
    assert colours[1] not in ("", lowest, highest)
    ticks = tab.locator(".legend .ticks").all_inner_texts()
    assert len(ticks) == 2
    assert not [text for text in ticks if "NaN" in text or "Infinity" in text or "–" in text]
    ink = """() => {
      const canvas = document.querySelector('.head_atlas canvas');
      const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      return new Set(Array.from({ length: data.length / 4 }, (_, i) => data.slice(4 * i, 4 * i + 3).join())).size;
    }"""
    assert tab.evaluate(ink) > 5  # six heads of several colours
    page.assert_clean()


@pytest.mark.browser
def test_infinite_cells_leave_the_scale_to_the_others(page: WatchedPage, tmp_path: Path) -> None:
    maps = np.array([[[0.25, NAN], [INF, 0.5]], [[INF, INF], [NAN, NAN]]])
    gallery = head_gallery(maps, [(0, 0), (0, 1)], axes=Axes("row", "column"), numbers={"n": [INF, 1.0]})
    both = compare(maps[0], maps[0][::-1].copy())
    path = disk.write(tmp_path / "page.html", pages.render("Not finite", [gallery.spec, both.spec]))
    tab = page.open(path)
    tab.wait_for_selector("html[data-ready]")
    for kind, top in (("head_gallery", "0.5"), ("compare", "0.5")):
        assert tab.locator(f".{kind} .legend .ticks").first.inner_text().endswith(top)
    assert gallery.to_png()
    assert both.to_png()
    page.assert_clean()


@pytest.mark.browser
def test_an_infinite_value_alone_leaves_the_scale_to_the_others(page: WatchedPage, tmp_path: Path) -> None:
    """Without a NaN beside it, which would be left out in another way."""
    maps = np.array([[[0.25, 0.0], [INF, 0.5]], [[0.5, 0.5], [0.0, 0.25]]])
    made = [
        token_strip(["a", "b", "c"], torch.tensor([1.0, INF, 0.0])),
        head_atlas(torch.tensor([[1.0, 0.5, 0.0], [INF, 0.25, 0.75]])),
        head_gallery(maps, [(0, 0), (0, 1)], axes=Axes("row", "column"), numbers={"n": [INF, 1.0]}),
        compare(maps[0], maps[1]),
    ]
    path = disk.write(tmp_path / "page.html", pages.render("Infinite", [view.spec for view in made]))
    tab = page.open(path)
    tab.wait_for_selector("html[data-ready]")
    for view, top in zip(made, ("1", "1", "0.5", "0.5"), strict=True):
        ticks = tab.locator(f".{view.spec.kind} .legend .ticks").first.locator("span").all_inner_texts()
        assert ticks[0] == "0"
        assert ticks[-1] == top, view.spec.kind
    colours = tab.locator(".strip .token").evaluate_all("each => each.map((one) => one.style.backgroundColor)")
    assert colours[0] == colours[1] != colours[2]
    bars = tab.locator(".ranking li").all_inner_texts()
    assert len(bars) == 5  # an infinite number has no rank
    assert not [text for text in tab.locator(".workbench").all_inner_texts() if "NaN" in text or "Infinity" in text]
    page.assert_clean()


def test_notes_tell_infinite_values_from_the_largest_and_the_unknown() -> None:
    infinite = "1 values are infinite and have the colour at the end of the scale; the table tells them apart."
    assert token_strip(["a", "b"], torch.tensor([INF, 1.0])).spec.notes == (infinite,)
    both = token_strip(["a", "b", "c"], torch.tensor([INF, 1.0, NAN])).spec.notes
    assert both == ("1 values are not known and grey.", infinite)
    assert head_atlas(torch.tensor([[INF, 1.0]])).spec.notes == ("Infinite for some heads, and grey there: value.",)
    assert token_strip(["a", "b"], torch.tensor([0.0, 1.0])).spec.notes == ()


def test_pictures_have_finite_scales() -> None:
    assert scales.limits([1.0, NAN, INF, -INF], signed=False) == (0.0, 1.0)
    assert scales.limits([NAN, INF], signed=True) == (-1.0, 1.0)
    assert token_strip(["a", "b"], torch.tensor([INF, 1.0])).to_png()
    assert head_atlas(torch.tensor([[INF, 1.0]])).to_png()
