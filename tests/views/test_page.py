"""Pages of views: addresses, shared selection, themes, printing, and no scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

import workbench
from support.browser import WatchedPage, settled
from workbench.errors import FileError, ReportError
from workbench.storage import disk
from workbench.views import token_strip
from workbench.views.base import page as pages

TOKENS = [f" w{i}" for i in range(9)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with two strips of the same tokens."""
    strips = [token_strip(TOKENS, range(9), title=title).spec for title in ("First", "Second")]
    return disk.write(tmp_path_factory.mktemp("page") / "two.html", pages.render("Two strips", strips))


def opened(watched: WatchedPage, file: Path, address: str = "") -> Page:
    watched.page.goto(file.as_uri() + address)
    watched.page.wait_for_selector("html[data-ready]")
    return watched.page


def chosen(page: Page) -> list[list[str]]:
    return page.evaluate(
        """[...document.querySelectorAll('.workbench')].map(view =>
             [...view.querySelectorAll('[aria-selected="true"]')].map(token => token.dataset.at))"""
    )


@pytest.mark.browser
def test_a_choice_shows_in_every_view_and_in_the_address(page: WatchedPage, two: Path) -> None:
    tab = opened(page, two)
    tab.locator(".workbench").first.locator("[data-at='4']").click()
    assert chosen(tab) == [["4"], ["4"]]
    assert tab.evaluate("location.hash") == "#q=4,t=4"
    page.assert_clean()


@pytest.mark.browser
def test_an_address_restores_the_choice(page: WatchedPage, two: Path) -> None:
    tab = opened(page, two, "#L5H1+3,q=12,k=4,t=7,s=decoder.0%2C1")
    assert chosen(tab) == [["7"], ["7"]]
    tab.locator("[data-at='7']").first.press("Escape")
    assert tab.evaluate("location.hash") == "#L5H1+3,q=12,k=4,s=decoder.0%2C1"
    tab.evaluate("location.hash = '#t=2'")
    tab.wait_for_function("() => document.querySelector('[aria-selected=\"true\"]')?.dataset.at === '2'")
    page.assert_clean()


@pytest.mark.browser
@pytest.mark.parametrize("address", ["#t=99999", "#L1H", "#t=-1,q=x", "#%E0%A4%A", "#s=%E0%A4", "#<script>", "#view-0"])
def test_a_wrong_address_does_no_harm(page: WatchedPage, two: Path, address: str) -> None:
    tab = opened(page, two, address)
    assert chosen(tab) == [[], []]
    page.assert_clean()


HOLD_IDLE = "globalThis.held = []; globalThis.requestIdleCallback = (does) => globalThis.held.push(does)"
DRAWN = """[...document.querySelectorAll('.workbench-view')].flatMap((each, i) =>
    each.querySelector('.workbench') ? [i] : [])"""
WAITING = "() => globalThis.held.length === 1"
GO_ON = "() => globalThis.held.shift()()"


def _pass(tab: Page) -> None:
    """Let the browser have nothing else to do, until all is drawn."""
    while not tab.evaluate("document.documentElement.dataset.ready ?? ''"):
        tab.evaluate("() => globalThis.held.shift()?.()")


@pytest.mark.browser
def test_what_is_near_is_drawn_first(page: WatchedPage, tmp_path: Path) -> None:
    """The rest when the browser has nothing else to do; until then its words and first numbers stand there."""
    n = 16
    specs = [token_strip(TOKENS, range(9), title=f"Strip {i}").spec for i in range(n)]
    file = disk.write(tmp_path / "many.html", pages.render("Many", specs))
    tab = page.page
    tab.set_viewport_size({"width": 900, "height": 600})
    tab.add_init_script(HOLD_IDLE)
    tab.goto(file.as_uri())
    tab.wait_for_function(WAITING)
    near = tab.evaluate(DRAWN)
    assert near == list(range(len(near)))
    assert 1 < len(near) < n - 4
    waiting = tab.locator(".workbench-view").nth(n - 1)
    assert "9 tokens, coloured by value" in waiting.inner_text()
    assert "w8" in waiting.inner_text()
    assert "needs JavaScript" not in tab.locator("main").inner_text()
    waiting.scroll_into_view_if_needed()
    tab.evaluate(GO_ON)
    tab.wait_for_function(WAITING)
    assert {n - 1, n - 2} <= set(tab.evaluate(DRAWN))
    assert n // 2 not in tab.evaluate(DRAWN)
    _pass(tab)
    assert tab.evaluate(DRAWN) == list(range(n))
    assert waiting.is_visible()
    page.assert_clean()


@pytest.mark.browser
def test_a_page_opens_at_the_figure_of_its_address(page: WatchedPage, tmp_path: Path) -> None:
    """Which is drawn before those above it, and stays where it is while they are drawn."""
    report = workbench.Report("Many")
    for i in range(12):
        report.add(token_strip(TOKENS * 30, range(270), title=f"Strip {i}"))
    tab = page.page
    tab.set_viewport_size({"width": 900, "height": 600})
    tab.add_init_script(HOLD_IDLE)
    tab.goto(report.write(tmp_path / "report.html").as_uri())
    place = tab.locator("figure").nth(9).get_attribute("id")
    tab.goto("about:blank")
    tab.goto(f"{(tmp_path / 'report.html').as_uri()}#{place},t=4")
    tab.wait_for_function(WAITING)
    assert 9 in tab.evaluate(DRAWN)
    assert 0 not in tab.evaluate(DRAWN)
    top = "document.querySelectorAll('figure')[9].getBoundingClientRect().top"
    before = tab.evaluate(top)
    assert 0 <= before < 20
    _pass(tab)
    settled(tab)
    assert tab.evaluate(DRAWN) == list(range(12))
    assert abs(tab.evaluate(top) - before) < 2
    page.assert_clean()


@pytest.mark.browser
def test_what_is_chosen_while_a_page_opens_is_in_its_address(page: WatchedPage, tmp_path: Path) -> None:
    specs = [token_strip(TOKENS, range(9), title=f"Strip {i}").spec for i in range(16)]
    tab = page.page
    tab.set_viewport_size({"width": 900, "height": 600})
    tab.add_init_script(HOLD_IDLE)
    tab.goto(disk.write(tmp_path / "many.html", pages.render("Many", specs)).as_uri())
    tab.wait_for_function(WAITING)
    tab.locator("[data-at='4']").first.click()
    assert tab.evaluate("location.hash") == "#q=4,t=4"
    _pass(tab)
    assert chosen(tab) == [["4"]] * 16
    assert tab.evaluate("location.hash") == "#q=4,t=4"
    page.assert_clean()


@pytest.mark.browser
def test_the_theme_can_be_chosen(page: WatchedPage, two: Path) -> None:
    tab = opened(page, two)
    for theme in ("dark", "light"):
        tab.locator("#theme").select_option(theme)
        assert tab.locator(f".workbench[data-theme={theme}]").count() == 2
        whole, inner = tab.evaluate(
            "['html', '.workbench'].map(name => getComputedStyle(document.querySelector(name)).backgroundColor)"
        )
        assert whole == inner
    page.assert_clean()


@pytest.mark.browser
def test_on_paper_a_page_is_light_and_bare(page: WatchedPage, two: Path) -> None:
    tab = opened(page, two)
    tab.locator("#theme").select_option("dark")
    tab.emulate_media(media="print")
    tab.wait_for_selector(".workbench[data-theme=light]")
    assert not tab.locator(".tools").first.is_visible()
    assert tab.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.browser
def test_without_scripts_the_page_says_so(browser: Browser, two: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(two.as_uri())
    assert "needs JavaScript" in tab.locator("main").inner_text()
    context.close()


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no folder"):
        token_strip(TOKENS, range(9)).to_html(tmp_path / "nowhere" / "page.html")
    with pytest.raises(FileError, match="is a folder"):
        token_strip(TOKENS, range(9)).to_png(tmp_path)


def test_a_view_outside_a_notebook_says_where_it_can_go() -> None:
    with pytest.raises(ReportError, match="there is no notebook"):
        token_strip(TOKENS, range(9)).show()


@pytest.mark.parametrize(
    ("tokens", "values", "said"),
    [([], [], "no tokens"), (["a"], [1, 2], "another shape"), (["a", "b"], [[1, 2]], "another shape")],
)
def test_a_strip_refuses_what_does_not_fit(tokens: list[str], values: list[Any], said: str) -> None:
    with pytest.raises(ReportError, match=said):
        token_strip(tokens, values)
