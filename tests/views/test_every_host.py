"""Every view, with what is chosen and set in it: on a page, in JupyterLab's own themes, printed, and opened again.

JupyterLab's themes write colours as words and short forms, such as `white` and `#111`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from support.browser import LOOKS, WatchedPage, changed, settled
from support.every_view import CHOOSING, FIGURES, FORMS, SETTING, VIEWS, page_of

THEMES = Path(sys.prefix) / "share" / "jupyter" / "lab" / "themes" / "@jupyterlab"
SPELLED = {"light": "#ffffff", "dark": "#111111"}

# What JupyterLab puts around an output, on one of our pages, before the page's own script runs.
INTO_LAB = """(style, light) => addEventListener('DOMContentLoaded', () => {
  const element = document.createElement('style');
  element.textContent = style;
  document.head.append(element);
  document.body.dataset.jpThemeLight = light;
  for (const view of document.querySelectorAll('.workbench-view')) {
    const area = document.createElement('div');
    area.className = 'jp-OutputArea jp-ThemedContainer';
    view.replaceWith(area);
    area.append(view);
  }
})"""
PIXELS = """Object.fromEntries([...document.querySelectorAll('.workbench')].map((view) =>
  [view.className, [...view.querySelectorAll('canvas')].map((canvas) => canvas.toDataURL())]))"""
# Whether each figure's axes have the ink of its view: that of the theme, and on paper of the light one.
INKED = """[...document.querySelectorAll('.workbench.figure')].map((view) => {
  const tick = view.querySelector('.main-svg :is(.xtick, .ytick) text');
  return tick !== null && getComputedStyle(tick).fill === getComputedStyle(view).color;
})"""
PAPER = "getComputedStyle(document.querySelector('.workbench')).getPropertyValue('--paper').trim()"
# Chooses and sets in each view what is given for its kind, as a person would; views of one model follow each other.
CHOOSE = """([chosen, set]) => {
  const store = globalThis[Symbol.for('workbench.selection')];
  const states = [];
  [...document.querySelectorAll('script[id^=view-]')].forEach(({ id, textContent }, i) => {
    if (chosen[i]) store.select(JSON.parse(textContent).scope, chosen[i]);
    if (set[i]) states.push(`${id}=${encodeURIComponent(JSON.stringify(set[i]))}`);
  });
  location.hash = [store.address(), ...states].join(',');
}"""


def choose(tab: Page, names: Iterable[str]) -> None:
    """Choose and set in the views of a page what is given for these kinds or forms."""
    tab.evaluate(CHOOSE, [[found.get(name) for name in names] for found in (CHOOSING, SETTING)])


@pytest.fixture(scope="module")
def every_view(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all kinds of views."""
    return page_of(VIEWS, tmp_path_factory.mktemp("page") / "all.html")


@pytest.fixture(scope="module")
def every_form(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with what kinds of views show besides, and with figures of results, in which nothing is chosen."""
    return page_of([*FORMS, *FIGURES], tmp_path_factory.mktemp("page") / "forms.html")


@contextmanager
def hosted(browser: Browser, file: Path, host: str, theme: str, address: str = "") -> Iterator[Page]:
    """The page in a host: "page", "lab" or "print"."""
    scheme: Any = theme
    context = browser.new_context(
        offline=True, bypass_csp=host == "lab", viewport={"width": 1100, "height": 800}, color_scheme=scheme
    )
    watched = WatchedPage(context.new_page())
    if host == "lab":
        style = (THEMES / f"theme-{theme}-extension" / "index.css").read_text(encoding="utf-8")
        arguments = f"{json.dumps(style)}, {json.dumps(str(theme == 'light').lower())}"
        watched.page.add_init_script(f"({INTO_LAB})({arguments})")
    watched.page.goto(file.as_uri() + address)
    watched.page.wait_for_selector("html[data-ready]")
    if host == "print":
        watched.page.emulate_media(media="print", color_scheme=scheme)
        watched.page.wait_for_selector(".workbench[data-theme=light]")
    settled(watched.page)
    yield watched.page
    watched.assert_clean()
    context.close()


@pytest.mark.browser
@pytest.mark.parametrize(
    ("host", "theme"), [("page", "light"), ("page", "dark"), ("lab", "light"), ("lab", "dark"), ("print", "dark")]
)
def test_every_view_shows_what_is_chosen_in_every_host_and_opens_again(
    host: str, theme: str, every_view: Path, browser: Browser
) -> None:
    with hosted(browser, every_view, host, theme) as tab:
        before = tab.evaluate(LOOKS)
        assert sorted(before) == sorted(VIEWS)
        choose(tab, VIEWS)
        left, address = changed(tab, before), tab.evaluate("location.hash")
        themes = set(tab.evaluate("[...document.querySelectorAll('.workbench')].map(view => view.dataset.theme)"))
        assert themes == {"light" if host == "print" else theme}
    if (host, theme) == ("page", "light"):
        with hosted(browser, every_view, host, theme, address) as tab:
            tab.wait_for_function("() => !document.querySelector('.figure .ring').hidden")
            again = tab.evaluate(LOOKS)
        assert [kind for kind in left if left[kind][1:] != again[kind][1:]] == []


@pytest.mark.browser
@pytest.mark.parametrize(("host", "theme"), [("page", "dark"), ("lab", "light"), ("print", "dark")])
def test_every_form_shows_what_is_chosen_and_opens_again(
    host: str, theme: str, every_form: Path, browser: Browser
) -> None:
    with hosted(browser, every_form, host, theme) as tab:
        before = tab.evaluate(LOOKS)
        figures = [name for name in before if name.startswith("figure")]
        assert (len(figures), len(before)) == (len(FIGURES), len(FORMS) + len(FIGURES))
        tab.wait_for_function(f"() => {INKED}.every(Boolean)")
        before = {name: looks for name, looks in before.items() if name not in figures}
        choose(tab, FORMS)
        left, address = changed(tab, before), tab.evaluate("location.hash")
    if host == "page":
        with hosted(browser, every_form, host, theme, address) as tab:
            again = tab.evaluate(LOOKS)
        assert [name for name in left if left[name][1:] != again[name][1:]] == []


@pytest.mark.browser
@pytest.mark.parametrize("theme", SPELLED)
def test_colours_are_read_however_the_theme_writes_them(theme: str, every_view: Path, browser: Browser) -> None:
    """Views are drawn alike with the theme's `white` or `#111`, and with the same colour as six digits."""
    with hosted(browser, every_view, "lab", theme) as tab:
        paper, pixels = tab.evaluate(PAPER), tab.evaluate(PIXELS)
        tab.add_style_tag(content=f":root {{ --jp-layout-color0: {SPELLED[theme]}; }}")
        for light in (theme != "light", theme == "light"):  # drawn anew
            tab.evaluate("light => { document.body.dataset.jpThemeLight = light; }", str(light).lower())
            settled(tab)
        written, again = tab.evaluate(PAPER), tab.evaluate(PIXELS)
    assert len(paper) < len(written) == len("#rrggbb")
    assert [view for view in pixels if pixels[view] != again[view]] == []
