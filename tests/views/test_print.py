"""Printed pages: light whatever the system is, with every colour, whatever the browser does with backgrounds."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest
from playwright.sync_api import Browser

import workbench
from support.browser import WatchedPage
from support.every_view import VIEWS, capture, page_of


@pytest.fixture(scope="module")
def every_view(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all kinds of views."""
    return page_of(VIEWS, tmp_path_factory.mktemp("page") / "all.html")


def printed(browser: Browser, file: Path, scheme: str, backgrounds: bool) -> list[bytes]:
    """What a PDF of the page draws: its content, images and fonts, without dates and ids."""
    context = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": 1200, "height": 900})
    watched = WatchedPage(context.new_page())
    page = watched.open(file)
    page.wait_for_selector("html[data-ready]")
    found = page.pdf(format="A4", print_background=backgrounds)
    watched.assert_clean()
    context.close()
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", found, re.DOTALL)
    # The last byte of a stream may look like the end of its line: a decompressor that waits for more does not mind.
    return [zlib.decompressobj().decompress(stream) if stream[:1] == b"x" else stream for stream in streams]


@pytest.mark.browser
def test_a_print_is_the_same_from_a_dark_system_and_without_backgrounds(browser: Browser, every_view: Path) -> None:
    wanted = printed(browser, every_view, "light", backgrounds=True)
    found = printed(browser, every_view, "dark", backgrounds=False)
    assert len(wanted) > 50
    assert [i for i, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1]] == []


@pytest.mark.browser
def test_edges_of_circuits_are_on_one_canvas_that_nothing_hides(browser: Browser, every_view: Path) -> None:
    """What lies over a canvas hides it in a PDF: its pixels, not a screenshot, are what is printed."""
    context = browser.new_context(offline=True, color_scheme="dark")
    page = context.new_page()
    page.goto(every_view.as_uri())
    page.wait_for_selector("html[data-ready]")
    page.emulate_media(media="print")
    page.wait_for_selector(".circuit_graph[data-theme=light]")
    shown = """(kind) => [...document.querySelectorAll(`.${kind} .plane canvas`)]
        .filter((canvas) => getComputedStyle(canvas).display !== 'none')
        .map((canvas) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data
            .reduce((ink, value, i) => ink + (i % 4 === 3 && value > 20 ? 1 : 0), 0))"""
    for kind in ("circuit_graph", "overlap_matrix"):
        inked = page.evaluate(shown, kind)
        assert len(inked) == 1, kind
        assert inked[0] > 1000, kind
    context.close()


@pytest.mark.browser
def test_headings_stay_with_what_they_name(page: WatchedPage, tmp_path: Path) -> None:
    report = workbench.Report("Heads", answer="Two do.").add(capture(), note="A note.")
    tab = page.open(report.write(tmp_path / "report.html"))
    tab.wait_for_selector("html[data-ready]")
    tab.emulate_media(media="print")
    named = "[...document.querySelectorAll('h1, h2, h3, figcaption, .workbench .caption, .part > .note')]"
    stranded = "filter((each) => getComputedStyle(each).breakAfter !== 'avoid').map((each) => each.tagName)"
    assert tab.evaluate(f"{named}.length") > 10
    assert tab.evaluate(f"{named}.{stranded}") == []
    torn = "[...document.querySelectorAll('figure')].filter((e) => getComputedStyle(e).breakInside !== 'avoid').length"
    assert tab.evaluate(torn) == 0
    page.assert_clean()


@pytest.mark.browser
def test_only_where_no_script_runs_a_page_says_so(browser: Browser, every_view: Path) -> None:
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.add_init_script("Promise.all = () => new Promise(() => undefined)")  # the views are never drawn
    page.goto(every_view.as_uri())
    claims = page.get_by_text("needs JavaScript")
    assert claims.count() == len(VIEWS)
    assert not any(claim.is_visible() for claim in claims.all())
    context.close()
