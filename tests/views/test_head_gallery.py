"""The gallery holds each head's map as it is given, and a head chosen in it is chosen everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.browser import WatchedPage
from workbench.errors import ReportError
from workbench.views import Axes, Group, head_gallery
from workbench.views.head_gallery import MOST

AXES = Axes("rows down", "columns to the right", -1, -2, "weight per query")


def maps(n: int = 4, rows: int = 3, columns: int = 5) -> Any:
    return np.random.default_rng(0).random((n, rows, columns))


def test_maps_numbers_and_groups_are_those_given() -> None:
    given, numbers = maps(), np.array([0.5, np.nan, 2.0, 1.0])
    spec = head_gallery(
        given,
        [(0, 0), (0, 1), (3, 0), (3, 2)],
        axes=AXES,
        groups=[Group("far", [2, 0], given[2]), Group("near", [1, 3])],
        numbers={"distance": numbers},
        said=["a", "b", "c", "d"],
    ).spec
    np.testing.assert_array_equal(spec.blocks["maps"], given.astype(np.float32))
    np.testing.assert_array_equal(spec.blocks["means"], given[2:3].astype(np.float32))
    np.testing.assert_array_equal(spec.table["distance"], numbers)
    assert [head["label"] for head in spec.facts["heads"]] == ["L0H0", "L0H1", "L3H0", "L3H2"]
    assert [(g["members"], g["mean"]) for g in spec.facts["groups"]] == [([2, 0], 0), ([1, 3], None)]


def test_heads_stand_by_layer_unless_grouped_and_many_are_cut() -> None:
    spec = head_gallery(maps(), [(1, 0), (0, 0), (1, 1), (0, 1)], axes=AXES).spec
    assert [(g["label"], g["members"]) for g in spec.facts["groups"]] == [("Layer 1", [0, 2]), ("Layer 0", [1, 3])]
    sites = ["encoder.0", "decoder.0", "encoder.0", "decoder.0"]
    spec = head_gallery(maps(), [(0, 0), (0, 0), (0, 1), (0, 1)], sites=sites, axes=AXES).spec
    assert [(g["label"], g["members"]) for g in spec.facts["groups"]] == [("encoder.0", [0, 2]), ("decoder.0", [1, 3])]
    n = MOST + 5
    spec = head_gallery(maps(n, 1, 2), [(i, 0) for i in range(n)], axes=AXES).spec
    assert len(spec.facts["heads"]) == MOST
    assert len(spec.table["label"]) == n
    assert f"{n:,} heads" in spec.notes[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"maps": np.zeros((0, 2, 2)), "heads": []}, "at least one"),
        ({"maps": np.zeros((2, 2))}, "at least one"),
        ({"heads": [(0, 0)]}, "as many as heads"),
        ({"labels": ["a"]}, "4 heads and 1 labels"),
        ({"numbers": {"x": [1.0]}}, "another number of x"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"maps": maps(), "heads": [(0, i) for i in range(4)], **change}
    with pytest.raises(ReportError, match=said):
        head_gallery(given.pop("maps"), given.pop("heads"), axes=AXES, **given)


@pytest.mark.browser
def test_a_head_is_chosen_by_pointer_keys_and_from_elsewhere(page: WatchedPage, tmp_path: Path) -> None:
    given = maps()
    view = head_gallery(given, [(0, 0), (0, 1), (3, 0), (3, 2)], axes=AXES, numbers={"distance": np.arange(4.0)})
    page.page.goto(Path(view.to_html(tmp_path / "gallery.html")).as_uri() + "#L3H2")
    tab = page.page
    tab.wait_for_selector("html[data-ready]")
    assert tab.locator(".detail h3").inner_text() == "L3H2"
    assert tab.locator(".numbers dd .n").inner_text() == "3"
    tab.get_by_role("button", name="L0H1").click()
    assert tab.evaluate("location.hash") == "#L0H1"
    assert tab.locator(".detail h3").inner_text() == "L0H1"
    tab.keyboard.press("ArrowDown")
    assert tab.locator(".detail h3").inner_text() == "L3H2"
    assert tab.evaluate("location.hash") == "#L0H1"
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash") == "#L3H2"
    tab.locator(".detail canvas").focus()
    tab.keyboard.press("Home")
    row, column = 1, 0
    value = f"{np.float32(given[3, row, column]):.6g}"
    assert (
        tab.locator(".status").inner_text() == f"L3H2, rows down 0, columns to the right -2: weight per query {value}"
    )
    tab.keyboard.press("Escape")
    assert tab.evaluate("location.hash") == ""
    page.assert_clean()


def test_the_still_picture_of_many_heads_stays_small() -> None:
    from matplotlib.figure import Figure

    n = 400
    view = head_gallery(maps(n, 1, 2), [(i // 2, i % 2) for i in range(n)], axes=AXES)
    figure = Figure()
    view.picture(figure)
    assert figure.get_figheight() < 20
    assert len(figure.axes) == 16 * 3
