"""Reading a page by keys, on a phone, and with a pointer that passes over it."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page

import workbench
from support.browser import WatchedPage
from support.every_view import FIGURES, FORMS, VIEWS, capture, page_of
from workbench.views import head_atlas

MOST_STOPS = 20
STOPS = """(view) => [...view.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex]')]
    .filter((each) => each.tabIndex >= 0 && each.checkVisibility() && !each.disabled).length"""


@pytest.fixture(scope="module")
def every_view(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all kinds of views."""
    return page_of(VIEWS, tmp_path_factory.mktemp("page") / "all.html")


def opened(watched: WatchedPage, file: Path) -> Page:
    tab = watched.open(file)
    tab.wait_for_selector("html[data-ready]")
    return tab


@pytest.mark.browser
def test_pages_fit_a_phone(page: WatchedPage, every_view: Path, tmp_path: Path) -> None:
    page.page.set_viewport_size({"width": 390, "height": 844})
    report = workbench.Report("A report of a model").add(capture(), text=" ".join(["word"] * 60))
    others = page_of([*FORMS, *FIGURES], tmp_path / "others.html")
    for file in (every_view, others, report.write(tmp_path / "report.html")):
        tab = opened(page, file)
        for width in (390, 360):
            tab.set_viewport_size({"width": width, "height": 844})
            tab.wait_for_function("() => document.documentElement.scrollWidth <= innerWidth")
    page.assert_clean()


@pytest.mark.browser
def test_views_have_few_tab_stops_and_can_be_skipped(page: WatchedPage, every_view: Path) -> None:
    tab = opened(page, every_view)
    stops = tab.evaluate(
        f"[...document.querySelectorAll('.workbench')].map((view) => [view.className, ({STOPS})(view)])"
    )
    assert [each for each in stops if each[1] > MOST_STOPS] == []
    first = tab.locator(".workbench").first.get_by_role("button", name="Skip this view")
    first.press("Enter")
    tab.keyboard.press("Tab")
    at = "[...document.querySelectorAll('.workbench')].indexOf(document.activeElement.closest('.workbench'))"
    assert tab.evaluate(at) == 1
    page.assert_clean()


@pytest.mark.browser
def test_a_list_of_heads_is_one_stop(page: WatchedPage, tmp_path: Path) -> None:
    scores = {(layer, head): 1.0 - 0.01 * (4 * layer + head) for layer in range(4) for head in range(4)}
    tab = opened(page, Path(head_atlas({"score": scores}).to_html(tmp_path / "atlas.html")))
    buttons = tab.locator(".ranking button")
    assert buttons.count() == 16
    buttons.first.focus()
    for key, at in (("ArrowDown", 1), ("ArrowRight", 2), ("ArrowUp", 1), ("End", 15), ("Home", 0), ("ArrowDown", 1)):
        tab.keyboard.press(key)
        assert tab.evaluate("[...document.querySelectorAll('.ranking button')].indexOf(document.activeElement)") == at
        assert tab.evaluate("document.querySelectorAll('.ranking button[tabindex=\"0\"]').length") == 1
    tab.keyboard.press("Enter")  # the list is made anew, and the focus stays
    tab.wait_for_function("() => location.hash === '#L0H1'")
    tab.wait_for_function("() => document.activeElement === document.querySelectorAll('.ranking button')[1]")
    page.assert_clean()


@pytest.mark.browser
def test_a_pointer_over_a_circuit_moves_nothing(page: WatchedPage, every_view: Path) -> None:
    tab = opened(page, every_view)
    for kind in ("circuit_graph", "overlap_matrix"):
        before = tab.evaluate("document.documentElement.scrollHeight")
        for node in tab.locator(f".{kind} .node").all():
            node.hover()
            assert tab.evaluate("document.documentElement.scrollHeight") == before
    page.assert_clean()
