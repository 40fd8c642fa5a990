"""What holds of every view: sound specs, safe pages, static forms, keys, themes, and no network.

Pages are opened once in each theme, with all kinds that the same policy allows, and each kind is looked at there.
"""

from __future__ import annotations

import csv
import io
import json
import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

import workbench.views
from support.axe import axe_violations
from support.browser import WatchedPage, settled
from support.every_view import FIGURES, FORMS, VIEWS, WITH_TOKENS, made, page_of
from support.hostile import HOSTILE
from workbench.report import check
from workbench.storage import disk
from workbench.views import page as pages
from workbench.views.base import modules
from workbench.views.base.few_colours import few_colours
from workbench.views.base.kinds import kind_of

LARGEST_MODULE = 50_000
MOST_NODES = 5_000
NOTHING_TO_CHOOSE = frozenset({"capacity_curves", "conditioning_curves", "table", "tensor_peek", "what_if"})
"""Kinds of views in which Enter selects nothing."""
POLICIES = {plotly: [kind for kind in VIEWS if kind_of(kind).plotly == plotly] for plotly in (False, True)}
"""Kinds by whether a page with them may have styles that it does not name."""

Open = Callable[[str, str], WatchedPage]
each_kind = pytest.mark.parametrize("kind", VIEWS)
in_both_schemes = pytest.mark.parametrize("scheme", ["light", "dark"])


@pytest.fixture(scope="module")
def shown(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """The page that has a kind of view, in a theme; opened once, and left for the next test as it is."""
    folder = tmp_path_factory.mktemp("pages")
    opened: dict[tuple[bool, str], WatchedPage] = {}

    def show(kind: str, scheme: str) -> WatchedPage:
        plotly = kind_of(kind).plotly
        if (plotly, scheme) not in opened:
            path = page_of(POLICIES[plotly], folder / f"{plotly}.html")
            scheme_of: dict[str, str] = {"color_scheme": scheme}
            context = browser.new_context(offline=True, viewport={"width": 1280, "height": 800}, **scheme_of)  # type: ignore[arg-type]
            opened[plotly, scheme] = watched = WatchedPage(context.new_page())
            watched.open(path).wait_for_selector("html[data-ready]")
        return opened[plotly, scheme]

    yield show
    for watched in opened.values():
        watched.assert_clean()
        watched.page.context.close()


def test_every_module_of_the_package_is_tested_here() -> None:
    views = Path(workbench.views.__file__).parent
    assert sorted(path.name.partition(".")[0] for path in views.glob("*/*.schema.json")) == sorted(VIEWS)


@each_kind
def test_the_spec_is_json_and_the_same_every_time(kind: str) -> None:
    spec = made(kind).spec
    text = json.dumps(spec.to_static(), allow_nan=False)
    assert VIEWS[kind]().spec.digest == spec.digest
    assert spec.title
    assert spec.caption
    assert json.loads(text)["kind"] == kind


@pytest.mark.usefixtures("released")
@each_kind
def test_the_module_is_small_and_whole(kind: str) -> None:
    text = modules.live(kind)
    assert len(text.encode()) < LARGEST_MODULE
    assert text.count("export ") == 1
    assert "import {" not in text
    assert "innerHTML" not in text


@pytest.mark.parametrize("kind", [*VIEWS, *FORMS, *FIGURES])
def test_no_words_are_numbers_that_are_not(kind: str) -> None:
    """What is not known is said in words or left out."""
    spec = made(kind).spec
    said = " ".join([spec.title, spec.caption, *spec.notes])
    assert re.findall(r"(?i)\b(?:nan|inf|none)\b", said) == []


@pytest.mark.parametrize("kind", [*VIEWS, *FORMS, *FIGURES])
def test_the_page_is_sound_and_the_same_every_time(kind: str, tmp_path: Path) -> None:
    file = Path(made(kind).to_html(tmp_path / "view.html"))
    assert check(file) == []
    assert made(kind).to_html() == file.read_text(encoding="utf-8")


@pytest.mark.browser
@in_both_schemes
@each_kind
def test_a_view_is_drawn_without_a_network(kind: str, scheme: str, shown: Open) -> None:
    watched = shown(kind, scheme)
    view = watched.page.locator(f".workbench.{kind}")
    assert 10 < view.locator("*").count() < MOST_NODES
    assert view.locator(".body").inner_text() or view.locator(".body canvas").count()
    background = view.evaluate("view => getComputedStyle(view).backgroundColor")
    light = sum(int(part) for part in re.findall(r"\d+", background)[:3]) > 382
    assert light == (scheme == "light")
    watched.assert_clean()


@pytest.mark.browser
@in_both_schemes
@pytest.mark.parametrize("plotly", POLICIES)
def test_there_is_nothing_for_axe_to_report(plotly: bool, scheme: str, shown: Open) -> None:
    assert axe_violations(shown(POLICIES[plotly][0], scheme).page) == []


@pytest.mark.browser
@pytest.mark.parametrize("plotly", POLICIES)
def test_pages_fit_their_window(plotly: bool, shown: Open) -> None:
    page = shown(POLICIES[plotly][0], "light").page
    for width in (1280, 900, 640):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)
    page.set_viewport_size({"width": 1280, "height": 800})


@pytest.mark.browser
@each_kind
def test_keys_alone_reach_what_the_pointer_does(kind: str, shown: Open) -> None:
    watched = shown(kind, "light")
    page, view = watched.page, watched.page.locator(f".workbench.{kind}")
    selects = kind not in NOTHING_TO_CHOOSE
    seen: set[str] = set()
    chosen = False
    view.locator(".skip").focus()
    for _ in range(60):
        if len(seen) >= 2 and (chosen or not selects):
            break
        page.keyboard.press("Tab")
        if not view.evaluate(
            "view => view.contains(document.activeElement)"
            " && !/^(SELECT|INPUT|BUTTON|SUMMARY)$/.test(document.activeElement.tagName)"
        ):
            continue
        for key in ("ArrowRight", "ArrowDown", "Home", "End"):
            before = page.evaluate("location.hash")
            page.keyboard.press(key)
            seen |= {view.locator(".status").inner_text()} - {""}
            if not chosen:
                page.keyboard.press("Enter")
                chosen = page.evaluate("location.hash") != before
    assert len(seen) >= 2, "arrow keys tell no values"
    assert chosen or not selects, "Enter does nothing"
    watched.assert_clean()


@pytest.mark.browser
@each_kind
def test_help_opens_by_a_key(kind: str, shown: Open) -> None:
    view = shown(kind, "light").page.locator(f".workbench.{kind}")
    for opens in (True, False):
        view.locator("[tabindex='0']").first.press("?")
        assert view.locator(".keys").evaluate("keys => keys.open") == opens


@pytest.mark.browser
@each_kind
def test_the_table_and_the_files_hold_the_numbers(kind: str, shown: Open) -> None:
    watched, table = shown(kind, "light"), made(kind).data()
    view = watched.page.locator(f".workbench.{kind}")
    whole = json.loads(watched.file(view.get_by_role("button", name="JSON")).read_text(encoding="utf-8"))
    assert whole["title"] == made(kind).spec.title
    if table.empty:
        return
    text = watched.file(view.get_by_role("button", name="CSV", exact=True)).read_text(encoding="utf-8-sig")
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == list(table.columns)
    assert len(rows) == len(table) + 1
    view.locator(".data > summary").click()
    view.locator(".data tbody tr").first.wait_for()
    assert view.locator(".data tbody tr").count() == min(50, len(table))
    watched.assert_clean()


@pytest.mark.parametrize("kind", [*VIEWS, *FORMS, *FIGURES])
def test_there_are_static_forms(kind: str) -> None:
    view = made(kind)
    bundle = view._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "<script" not in bundle["text/html"]
    assert 'src="data:image/png;base64,' in bundle["text/html"]
    assert "<table" in bundle["text/html"] or view.data().empty
    assert view.spec.title in bundle["text/plain"]
    assert len(bundle["text/html"]) < 300_000
    of_light = re.findall(r'src="data:image/png;base64,([^"]+)"', bundle["text/html"])
    of_dark = re.findall(r'content:url\("data:image/png;base64,([^"]+)"\)', bundle["text/html"])
    stills = [Image.open(BytesIO(b64decode(found))) for found in (*of_light, *of_dark)]
    assert [still.convert("RGB").getpixel((1, 1)) for still in stills] == [(255, 255, 255), (20, 23, 27)]
    assert stills[0].size == stills[1].size
    assert stills[0].convert("RGB").tobytes() != stills[1].convert("RGB").tobytes()
    assert 'style="margin:0' in bundle["text/html"]  # the light card needs no style sheet


@pytest.mark.parametrize("kind", ["attention_pattern", "image_attention", "token_strip"])
def test_the_dark_picture_of_a_notebook_is_the_one_that_the_view_draws_alone(kind: str) -> None:
    """In fewer colours; it is not laid out again, of axes, colour bars and texts around them."""
    dark = made(kind).to_png(theme="dark")
    assert isinstance(dark, bytes)
    html = made(kind)._repr_mimebundle_()["text/html"]
    (still,) = re.findall(r'content:url\("data:image/png;base64,([^"]+)"\)', html)
    few = few_colours(Image.open(BytesIO(dark)), 128)
    assert few.convert("RGB").tobytes() == Image.open(BytesIO(b64decode(still))).convert("RGB").tobytes()


@pytest.mark.browser
@pytest.mark.parametrize("plotly", POLICIES)
def test_hostile_tokens_are_text_and_nothing_more(plotly: bool, page: WatchedPage, tmp_path: Path) -> None:
    names = [name for name in WITH_TOKENS if kind_of(made(name).spec.kind).plotly == plotly]
    views = [WITH_TOKENS[name](tuple(HOSTILE)) for name in names]
    path = disk.write(tmp_path / "hostile.html", pages.render("Hostile", [view.spec for view in views]))
    assert check(path) == []
    tab: Page = page.open(path)
    tab.wait_for_selector("html[data-ready]")
    for details in tab.locator("details").all():
        details.evaluate("each => { each.open = true; }")
    for canvas in tab.locator(".workbench canvas:visible").all():
        canvas.hover(force=True)
    settled(tab)
    assert tab.evaluate("window.__pwn") is None
    assert tab.locator(".workbench script, .workbench img, .workbench a").count() == 0
    for i, view in enumerate(views):
        spec = tab.evaluate("id => JSON.parse(document.getElementById(id).textContent)", f"view-{i}")
        held = json.dumps(spec["facts"], ensure_ascii=False) + json.dumps(spec["table"], ensure_ascii=False)
        missing = [text for text in HOSTILE.values() if json.dumps(text, ensure_ascii=False)[1:-1] not in held]
        assert missing == [], view.spec.kind
        table = view.data().to_csv()
        assert "\u202e" not in table
        assert "\x00" not in view._repr_mimebundle_()["text/html"]
    page.assert_clean()
