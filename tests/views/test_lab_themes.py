"""Every view inside JupyterLab's own themes, whose colours are words and short forms such as `white` and `#111`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from support.browser import WatchedPage, settled
from support.every_view import VIEWS
from workbench.storage import disk
from workbench.views import page as pages

THEMES = Path(sys.prefix) / "share" / "jupyter" / "lab" / "themes" / "@jupyterlab"

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
PAPER = "getComputedStyle(document.querySelector('.workbench')).getPropertyValue('--paper').trim()"


@pytest.mark.browser
@pytest.mark.parametrize(("theme", "spelled"), [("light", "#ffffff"), ("dark", "#111111")])
def test_colours_are_read_however_the_theme_writes_them(
    theme: str, spelled: str, browser: Browser, tmp_path: Path
) -> None:
    """Views are drawn alike with the theme's `white` or `#111`, and with the same colour as six digits."""
    style = (THEMES / f"theme-{theme}-extension" / "index.css").read_text(encoding="utf-8")
    specs = [made().spec for made in VIEWS.values()]
    path = disk.write(tmp_path / "all.html", pages.render("Every view", specs))

    def drawn(style: str) -> tuple[str, dict[str, Any]]:
        context = browser.new_context(offline=True, bypass_csp=True, viewport={"width": 1100, "height": 800})
        watched = WatchedPage(context.new_page())
        watched.page.add_init_script(f"({INTO_LAB})({json.dumps(style)}, {json.dumps(str(theme == 'light').lower())})")
        page = watched.open(path)
        page.wait_for_selector("html[data-ready]")
        settled(page)
        found = page.evaluate(PAPER), page.evaluate(PIXELS)
        watched.assert_clean()
        context.close()
        return found

    paper, pixels = drawn(style)
    written, again = drawn(f"{style}\n:root {{ --jp-layout-color0: {spelled}; }}")
    assert len(paper) < len(written) == len("#rrggbb")
    assert [view for view in pixels if pixels[view] != again[view]] == []
