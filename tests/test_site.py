"""The documentation site: every page is on it, it names what exists, and it is read and searched without a network."""

import inspect
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from support.browser import WatchedPage
from support.unavailable import unavailable

ROOT = Path(__file__).parents[1]
HTML = ROOT / ".cache" / "site" / "html"
NAV = re.findall(r"^ +- (?:.+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)


def make_site() -> dict[str, Any]:
    """The names of docs/make_site.py."""
    try:
        return runpy.run_path(str(ROOT / "docs" / "make_site.py"))
    except ModuleNotFoundError as error:
        unavailable(f"{error}: pip install -e '.[docs]'")


def test_every_page_and_notebook_is_in_the_navigation() -> None:
    pages = {path.relative_to(ROOT) for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md")}
    notebooks = {path.relative_to(ROOT).with_suffix(".md") for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert len(NAV) == len(set(NAV))
    missing = {str(path) for path in pages | notebooks} - set(NAV)
    assert not missing, f"enter them in mkdocs.yml: {missing}"


def test_every_public_name_is_in_the_reference() -> None:
    import workbench

    rooms = make_site()["public_names"]()
    assert {f"reference/{room}.md" for room in rooms} <= set(NAV)
    named = {path for names in rooms.values() for path in names}
    for name in workbench.__all__:
        if inspect.ismodule(getattr(workbench, name)):
            assert {f"workbench.{name}.{inner}" for inner in getattr(workbench, name).__all__} <= named
        else:
            assert f"workbench.{name}" in named


def documented() -> Iterator[tuple[str, Any]]:
    """What has parameters: functions, and what users call of classes."""
    for names in make_site()["public_names"]().values():
        for path, thing in names.items():
            if inspect.isclass(thing):
                for name, member in inspect.getmembers(thing, inspect.isroutine):
                    if not name.startswith("_") and "workbench" in (getattr(member, "__module__", None) or ""):
                        yield f"{path}.{name}", member
            elif inspect.isroutine(thing):
                yield path, thing


def test_docstrings_name_parameters_that_there_are() -> None:
    checked = 0
    for path, thing in documented():
        section = re.search(r"^Args:\n((?:    .*\n|\n)+)", (inspect.getdoc(thing) or "") + "\n", flags=re.MULTILINE)
        for line in re.findall(r"^    (\w+(?:, \*{0,2}\w+)*): ", section[1] if section else "", flags=re.MULTILINE):
            for name in re.split(r", \*{0,2}", line):
                checked += 1
                assert name in inspect.signature(thing).parameters, f"{path} has no parameter {name}"
    assert checked > 200


def test_examples_in_docstrings_are_fenced_whole() -> None:
    make_site()
    fenced = runpy.run_path(str(ROOT / "docs" / "site" / "doctests.py"))["fenced"]
    text = "What.\n\n    >>> for i in (1, 2):\n    ...     print([[i], [0]])\n    [[1], [0]]\n\nMore."
    assert fenced(text) == text.replace("    >>>", "    ```pycon\n    >>>").replace("\n\nMore", "\n    ```\n\nMore")
    assert fenced("No example: a >> b.") == "No example: a >> b."


def test_no_picture_is_older_than_its_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_screenshots.py"))
    stale, drawing = script["stale"], script["drawing"]
    assert stale() == [], "python docs/make_screenshots.py"
    (tmp_path / "head_atlas").mkdir()
    (tmp_path / "head_atlas" / "head_atlas.js").write_text("export function render() {}")
    (tmp_path / "drawn.json").write_text(json.dumps({"head-atlas": ["head_atlas", drawing("head_atlas")]}))
    monkeypatch.setitem(stale.__globals__, "DRAWN", tmp_path / "drawn.json")
    assert stale() == []
    monkeypatch.setitem(stale.__globals__, "VIEWS", tmp_path)
    assert stale() == ["head-atlas"]


@pytest.mark.browser
@pytest.mark.slow
def test_the_site_builds_and_is_searched_without_a_network(browser: Browser) -> None:
    make_site()
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_site.py"], cwd=ROOT / "docs", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for theme in ("light", "dark"):
        context = browser.new_context(offline=True, color_scheme=theme)  # type: ignore[arg-type]
        watched = WatchedPage(context.new_page())
        page = watched.open(HTML / "docs" / "how-to.html")
        page.locator(".md-search__input").press_sequentially("sink logits")  # the theme hears keys alone
        page.locator(".md-search-result__link[href*='h=sink+logits']:visible").first.click()
        page.locator("article mark", has_text="sink").first.wait_for()
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 380) == (theme == "light")
        for name in ("index.html", "docs/gallery.html", "docs/statistics.html", "notebooks/01-first-look.html"):
            watched.open(HTML / name)
        assert watched.requests == []
        assert watched.errors == []
        context.close()
