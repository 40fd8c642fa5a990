"""What holds of every view: sound specs, safe pages, static forms, keys, themes, and no network."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

import workbench.views
from support.axe import axe_violations
from support.browser import WatchedPage, settled
from support.every_view import VIEWS, WITH_TOKENS
from support.hostile import HOSTILE
from workbench.report import check
from workbench.views import View
from workbench.views.base import modules

LARGEST_MODULE = 62_000
MOST_NODES = 5_000
NOTHING_TO_CHOOSE = frozenset({"capacity_curves", "conditioning_curves", "tensor_peek", "what_if"})
"""Kinds of views in which Enter selects nothing."""


@pytest.fixture(scope="module", params=VIEWS)
def view(request: pytest.FixtureRequest) -> View:
    return VIEWS[request.param]()


@pytest.fixture(scope="module")
def file(view: View, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(view.to_html(tmp_path_factory.mktemp("page") / f"{view.spec.kind}.html"))


@pytest.fixture
def scheme(request: pytest.FixtureRequest) -> str:
    """Light, where a test does not ask for both."""
    return str(getattr(request, "param", "light"))


in_both_schemes = pytest.mark.parametrize("scheme", ["light", "dark"], indirect=True)


@pytest.fixture
def watched(browser: Browser, scheme: str) -> Any:
    context = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": 1280, "height": 800})
    page = WatchedPage(context.new_page())
    yield page
    page.assert_clean()
    context.close()


def opened(watched: WatchedPage, file: Path) -> Page:
    page = watched.open(file)
    page.wait_for_selector("html[data-ready]")
    return page


def test_every_module_of_the_package_is_tested_here() -> None:
    views = Path(workbench.views.__file__).parent
    assert sorted(path.name.partition(".")[0] for path in views.glob("*/*.schema.json")) == sorted(VIEWS)


def test_the_spec_is_json_and_the_same_every_time(view: View) -> None:
    text = json.dumps(view.spec.to_static(), allow_nan=False)
    assert VIEWS[view.spec.kind]().spec.digest == view.spec.digest
    assert view.spec.title
    assert view.spec.caption
    assert json.loads(text)["kind"] == view.spec.kind


@pytest.mark.usefixtures("released")
def test_the_module_is_small_and_whole(view: View) -> None:
    text = modules.live(view.spec.kind)
    assert len(text.encode()) < LARGEST_MODULE
    assert text.count("export ") == 1
    assert "import {" not in text
    assert "innerHTML" not in text


def test_the_page_is_sound(file: Path) -> None:
    assert check(file) == []


def test_the_page_has_the_same_bytes_every_time(view: View, file: Path) -> None:
    assert VIEWS[view.spec.kind]().to_html() == file.read_text(encoding="utf-8")


@pytest.mark.browser
@in_both_schemes
def test_the_page_draws_without_a_network(file: Path, watched: WatchedPage, scheme: str) -> None:
    page = opened(watched, file)
    nodes = page.evaluate("document.querySelectorAll('.workbench *').length")
    assert 10 < nodes < MOST_NODES
    background = page.evaluate("getComputedStyle(document.querySelector('.workbench')).backgroundColor")
    light = sum(int(part) for part in re.findall(r"\d+", background)[:3]) > 382
    assert light == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


@pytest.mark.browser
def test_the_page_fits_a_narrow_window(file: Path, watched: WatchedPage) -> None:
    page = opened(watched, file)
    page.set_viewport_size({"width": 640, "height": 800})
    page.wait_for_function("() => document.documentElement.scrollWidth <= 640")


@pytest.mark.browser
@in_both_schemes
def test_there_is_nothing_for_axe_to_report(file: Path, watched: WatchedPage) -> None:
    page = opened(watched, file)
    assert axe_violations(page) == []


@pytest.mark.browser
def test_keys_alone_reach_what_the_pointer_does(view: View, file: Path, watched: WatchedPage) -> None:
    page = opened(watched, file)
    before = page.evaluate("location.hash")
    selects = view.spec.kind not in NOTHING_TO_CHOOSE
    seen: set[str] = set()
    chosen = False
    for _ in range(60):
        if len(seen) >= 2 and (chosen or not selects):
            break
        page.keyboard.press("Tab")
        if not page.evaluate(
            "document.activeElement?.closest('.workbench') !== null"
            " && !/^(SELECT|INPUT|BUTTON|SUMMARY)$/.test(document.activeElement.tagName)"
        ):
            continue
        for key in ("ArrowRight", "ArrowDown", "Home", "End"):
            page.keyboard.press(key)
            seen |= {page.evaluate("document.querySelector('.workbench .status').textContent")} - {""}
            if not chosen:
                page.keyboard.press("Enter")
                chosen = page.evaluate("location.hash") != before
    assert len(seen) >= 2, "arrow keys tell no values"
    assert chosen or not selects, "Enter does nothing"


@pytest.mark.browser
def test_help_opens_by_a_key(file: Path, watched: WatchedPage) -> None:
    page = opened(watched, file)
    assert not page.evaluate("document.querySelector('.workbench .keys').open")
    page.locator(".workbench [tabindex='0']").first.focus()
    page.keyboard.press("?")
    assert page.evaluate("document.querySelector('.workbench .keys').open")


@pytest.mark.browser
def test_the_table_and_the_files_hold_the_numbers(view: View, file: Path, watched: WatchedPage, tmp_path: Path) -> None:
    page = opened(watched, file)
    table = view.data()
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").first.click()
    whole = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert whole["title"] == view.spec.title
    if table.empty:
        return
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").first.click()
    text = Path(download.value.path()).read_text(encoding="utf-8-sig")
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == list(table.columns)
    assert len(rows) == len(table) + 1
    page.locator(".data > summary").first.click()
    page.wait_for_selector(".data tbody tr")
    assert page.locator(".data tbody tr").count() == min(50, len(table))


def test_there_are_static_forms(view: View) -> None:
    bundle = view._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "<script" not in bundle["text/html"]
    assert 'src="data:image/png;base64,' in bundle["text/html"]
    assert "<table" in bundle["text/html"] or view.data().empty
    assert view.spec.title in bundle["text/plain"]
    assert len(bundle["text/html"]) < 300_000
    dark = view.to_png(theme="dark")
    assert isinstance(dark, bytes)
    assert dark != bundle["image/png"]
    assert view.to_png() == bundle["image/png"]


@pytest.mark.browser
@pytest.mark.parametrize("kind", WITH_TOKENS)
def test_hostile_tokens_are_text_and_nothing_more(kind: str, browser: Browser, tmp_path: Path) -> None:
    view = WITH_TOKENS[kind](tuple(HOSTILE))
    path = Path(view.to_html(tmp_path / "hostile.html"))
    assert check(path) == []
    context = browser.new_context(offline=True)
    watched = WatchedPage(context.new_page())
    page = opened(watched, path)
    for details in page.locator("details").all():
        details.evaluate("each => { each.open = true; }")
    page.mouse.move(300, 300)
    settled(page)
    assert page.evaluate("window.__pwn") is None
    assert page.locator(".workbench script, .workbench img, .workbench a").count() == 0
    spec = page.evaluate("JSON.parse(document.getElementById('view-0').textContent)")
    held = json.dumps(spec["facts"], ensure_ascii=False) + json.dumps(spec["table"], ensure_ascii=False)
    for shown in HOSTILE.values():
        assert json.dumps(shown, ensure_ascii=False)[1:-1] in held
    watched.assert_clean()
    context.close()
    table = view.data().to_csv()
    assert "\u202e" not in table
    assert "\x00" not in view._repr_mimebundle_()["text/html"]
