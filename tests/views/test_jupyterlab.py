"""In a real JupyterLab: views live, clicks reach Python, and a notebook opened again still shows its pictures."""

from __future__ import annotations

import time
from base64 import b64decode
from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbconvert import HTMLExporter
from PIL import Image
from playwright.sync_api import Browser, Page

from support import pdf
from support.browser import LOOKS, changed
from support.every_view import VIEWS
from support.jupyterlab import command, jupyterlab, open_instead, open_notebook, run_all, run_code
from support.patience import PATIENCE

pytestmark = [pytest.mark.browser, pytest.mark.slow]
_KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
_ASKS = """from hashlib import sha256
from workbench.views import SHARED
print('selected', SHARED.value, made['circuit_graph'].pins, len(made['playground'].edits), 'ablated')
print('picture', sha256(made['token_strip'].to_png()).hexdigest())"""
_SHOWS = "made[{0!r}] = VIEWS[{0!r}]()\nmade[{0!r}]"
_CHOOSES = """from support.every_view import CHOOSING, SETTING
for kind, view in made.items():
    view.set_state(**SETTING.get(kind, {})).select(**CHOOSING.get(kind, {}))
SHARED.select(**CHOOSING["run_timeline"] | {"heads": (2,)})  # whose site the layers chosen after it have taken back"""
_LARGEST_STILL = 300_000


def _notebook(folder: Path) -> Path:
    cells = [nbformat.v4.new_code_cell("from support.every_view import VIEWS\nmade = {}")]
    cells += [nbformat.v4.new_code_cell(_SHOWS.format(kind)) for kind in VIEWS]
    cells.append(nbformat.v4.new_code_cell(_ASKS))
    path = folder / "views.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": _KERNEL}), path)
    return path


class Watch:
    """Console errors and requests to anywhere but this machine."""

    def __init__(self, page: Page) -> None:
        self.errors: list[str] = []
        self.outside: list[str] = []
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        local = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(local) else self.outside.append(r.url))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, forked: list[str]) -> Iterator[tuple[str, Path]]:
    pytest.importorskip("jupyterlab")
    folder = tmp_path_factory.mktemp("notebooks")
    _notebook(folder)
    with jupyterlab(folder, tmp_path_factory.mktemp("home"), forked) as address:
        yield address, folder


@pytest.fixture(scope="module")
def run(lab: tuple[str, Path], browser: Browser) -> Iterator[tuple[Page, Watch]]:
    """The notebook, run once, with every view on it live."""
    address, _ = lab
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    watch = Watch(page)
    open_notebook(page, address, "views.ipynb")
    run_all(page)
    for kind in VIEWS:
        page.wait_for_selector(f".jp-OutputArea .workbench.{kind}")
    pictures = f"() => document.querySelectorAll('.workbench-still').length === {len(VIEWS)}"
    page.wait_for_function(pictures)  # they come after the widgets
    yield page, watch
    page.close()


def _selected(page: Page, wanted: str) -> str:
    """What Python says is selected: the last cell, run until it says what is wanted, or patience ends."""
    page.evaluate(
        """() => { const notebook = window.jupyterapp.shell.currentWidget.content;
                   notebook.activeCellIndex = notebook.widgets.length - 1; }"""
    )
    said, end = "", time.monotonic() + PATIENCE
    while wanted not in said and time.monotonic() < end:
        page.wait_for_timeout(300)
        command(page, "notebook:run-cell")
        said = page.locator(".jp-CodeCell .jp-OutputArea-output pre", has_text="selected ").last.inner_text()
    return said


def _saved(page: Page, path: Path) -> Any:
    """The notebook as JupyterLab has saved it."""
    command(page, "docmanager:save")
    return nbformat.read(path, as_version=4)


def _pictures(page: Page, folder: Path) -> dict[str, str]:
    """Kind of view -> the picture in the saved notebook."""
    command(page, "docmanager:save")
    page.wait_for_timeout(500)
    cells = nbformat.read(folder / "views.ipynb", as_version=4).cells[1 : 1 + len(VIEWS)]
    found = [[each.data["image/png"] for each in cell.outputs if "image/png" in each.get("data", {})] for cell in cells]
    return {kind: picture for kind, (picture,) in zip(VIEWS, found, strict=True)}


def test_every_view_is_live_and_hides_its_picture(run: tuple[Page, Watch]) -> None:
    page, watch = run
    page.wait_for_function("[...document.querySelectorAll('.workbench-still')].every(still => still.hidden)")
    assert page.locator(".workbench-still").count() == len(VIEWS)
    assert page.locator(".jp-OutputArea .workbench").count() == len(VIEWS)
    assert not watch.errors
    assert not watch.outside


def _turn(page: Page, theme: str) -> None:
    """Change JupyterLab's theme, for which it hides all views for a frame, until what is on the screen has its ink."""
    command(page, "apputils:change-theme", theme=f"JupyterLab {theme}")
    themed = f"[...document.querySelectorAll('.workbench')].every(view => view.dataset.theme === '{theme.lower()}')"
    page.wait_for_function(themed)
    page.locator(".workbench.figure").scroll_into_view_if_needed()
    inked = """[...document.querySelectorAll('.workbench.figure .main-svg :is(.xtick, .ytick) text')].every(
        tick => getComputedStyle(tick).fill === getComputedStyle(tick.closest('.workbench')).color)"""
    page.wait_for_function(inked)


def test_every_view_shows_what_is_chosen_in_both_themes(run: tuple[Page, Watch], lab: tuple[str, Path]) -> None:
    """Live in JupyterLab's own themes, and in a saved notebook's pictures; other tests choose only after this one."""
    page, watch = run
    before, pictures = {}, _pictures(page, lab[1])
    for theme in ("Light", "Dark"):
        _turn(page, theme)
        before[theme] = page.evaluate(LOOKS)
        assert sorted(before[theme]) == sorted(VIEWS)
    colour = page.evaluate("getComputedStyle(document.querySelector('.workbench')).backgroundColor")
    assert sum(int(part) for part in colour.strip("rgb()").split(",")) < 150
    run_code(page, _CHOOSES)
    for theme in ("Dark", "Light"):
        _turn(page, theme)
        changed(page, before[theme])
    for _ in range(PATIENCE):
        after = _pictures(page, lab[1])
        if not (same := [kind for kind in VIEWS if after[kind] == pictures[kind]]):
            break
    assert same == []
    assert not watch.errors


def test_a_click_reaches_python_and_every_other_view(run: tuple[Page, Watch]) -> None:
    page, watch = run
    page.locator(".workbench.token_strip [data-at='3']").click()
    assert "token 3" in _selected(page, "token 3")
    assert not watch.errors


def test_pictures_follow_what_is_chosen(run: tuple[Page, Watch], lab: tuple[str, Path]) -> None:
    """What is saved after a click is what Python would draw now, and it stays hidden while the view lives."""
    page, watch = run
    page.locator(".workbench.token_strip [data-at='5']").click()
    wanted = _selected(page, "token 5").partition("picture ")[2].strip()
    page.wait_for_function("[...document.querySelectorAll('.workbench-still')].every(still => still.hidden)")
    for _ in range(PATIENCE):
        found = sha256(b64decode(_pictures(page, lab[1])["token_strip"])).hexdigest()
        if found == wanted:
            break
    assert found == wanted
    assert not watch.errors


def test_a_pin_and_its_name_reach_python(run: tuple[Page, Watch]) -> None:
    page, watch = run
    run_code(page, "made['circuit_graph'].set_state(n=60)")  # so many edges that the head is there
    node = page.locator(".workbench.circuit_graph [data-node='a1.h3']")
    node.click()
    node.press("p")
    node.press("n")
    page.keyboard.type("mover <b>")
    page.keyboard.press("Enter")
    said = _selected(page, "{'a1.h3': 'mover <b>'}")
    assert "{'a1.h3': 'mover <b>'}" in said
    assert "L1H3" in said
    tag = page.locator(".workbench.circuit_graph .tag.pinned")
    assert tag.inner_text() == "mover <b>"
    assert not watch.errors


def test_what_is_pressed_in_a_playground_is_run(run: tuple[Page, Watch]) -> None:
    page, watch = run
    edits = "document.querySelectorAll('.workbench.playground .edits bdi').length"
    n = page.evaluate(edits)
    page.locator(".workbench.playground .matrix canvas").first.focus()
    for key in ("Home", "x"):
        page.keyboard.press(key)
    page.wait_for_function(f"{edits} === {n + 1}")
    assert f"{n + 1} ablated" in _selected(page, f"{n + 1} ablated")
    page.locator(".workbench.playground textarea").fill("")
    page.locator(".workbench.playground").get_by_role("button", name="Run").click()
    page.locator(".workbench.playground [role=alert]", has_text="the prompt is empty").wait_for()
    assert f"{n + 1} ablated" in _selected(page, f"{n + 1} ablated")
    assert not watch.errors


def test_jupyterlabs_own_styles_stay_outside(run: tuple[Page, Watch]) -> None:
    page, _ = run
    lists = "[...document.querySelectorAll('.workbench :is(dl, dt, dd)')]"
    assert page.evaluate(f"{lists}.length") > 20
    assert page.evaluate(f"{lists}.filter((each) => getComputedStyle(each).float !== 'none').length") == 0
    overlaps = """[...document.querySelectorAll('.workbench.what_if .numbers')].flatMap((list) => [...list.children])
        .filter((each) => each.querySelector('dt').offsetTop + each.querySelector('dt').offsetHeight
                          > each.querySelector('dd').offsetTop + 1).length"""
    assert page.evaluate(overlaps) == 0
    page.evaluate("document.querySelectorAll('.workbench .keys').forEach((keys) => (keys.open = true))")
    broken = """[...document.querySelectorAll('.workbench .keys dt')].filter((name) =>
        name.nextElementSibling.offsetLeft < name.offsetLeft + name.offsetWidth
        || name.nextElementSibling.offsetHeight > 3 * name.offsetHeight).length"""
    assert page.evaluate("document.querySelectorAll('.workbench .keys dt').length") > 40
    assert page.evaluate(broken) == 0


def test_keys_that_a_view_gets_are_not_jupyterlabs(run: tuple[Page, Watch]) -> None:
    page, watch = run
    cells = "window.jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model.sharedModel.getSource())"
    before = page.evaluate(cells)
    page.locator(".workbench.token_strip [data-at='3']").click()
    assert page.evaluate("document.activeElement.closest('.workbench') !== null")
    for key in ("d", "d", "a", "b", "x"):
        page.keyboard.press(key)
        page.wait_for_timeout(50)
    assert page.evaluate(cells) == before
    assert not watch.errors


def test_a_figure_for_a_paper_comes_from_the_kernel(run: tuple[Page, Watch]) -> None:
    page, watch = run
    files = {}
    for form in ("SVG", "PDF"):
        with page.expect_download() as download:
            page.locator(".workbench.token_strip").get_by_role("button", name=form, exact=True).click()
        files[form] = Path(download.value.path()).read_bytes()
    assert b"Token strip" in files["SVG"]
    assert "Token strip" in pdf.read(files["PDF"]).texts
    assert not watch.errors
    assert not watch.outside


@pytest.fixture(scope="module")
def saved(run: tuple[Page, Watch], lab: tuple[str, Path]) -> Any:
    """The notebook as JupyterLab saves it after the run."""
    return _saved(run[0], lab[1] / "views.ipynb")


def test_a_saved_notebook_is_small(saved: Any) -> None:
    states = saved.metadata.get("widgets", {})
    assert len(str(states)) < 10_000
    for cell in saved.cells[1:-1]:
        assert len(nbformat.v4.writes(nbformat.v4.new_notebook(cells=[cell]))) < _LARGEST_STILL, cell.source
        assert any("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.fixture(scope="module")
def again(saved: Any, lab: tuple[str, Path], browser: Browser) -> Iterator[Page]:
    """A JupyterLab that has run nothing, with the saved notebook as it comes from somebody else."""
    foreign = nbformat.from_dict(saved)
    foreign.metadata["changed"] = True  # no longer what was signed when it ran
    nbformat.write(foreign, lab[1] / "again.ipynb")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    open_notebook(page, lab[0], "again.ipynb")
    yield page
    page.close()


def test_a_notebook_opened_again_untrusted_shows_pictures_and_tables(again: Page) -> None:
    assert not again.evaluate("window.jupyterapp.shell.currentWidget.content.model.cells.get(1).trusted")
    drawn = "[...document.querySelectorAll('.jp-OutputArea img')].filter(i => i.naturalWidth > 100).length"
    again.wait_for_function(f"{drawn} >= {len(VIEWS)}")
    assert again.locator(".jp-OutputArea table").count() >= 1
    assert again.locator(".workbench").count() == 0
    assert again.evaluate(drawn) == len(VIEWS)  # each picture once


def _papers(page: Page) -> set[Any]:
    """What the left upper corners of the pictures look like."""
    page.evaluate("Promise.all([...document.querySelectorAll('.workbench-still img')].map((image) => image.decode()))")
    shots = [each.screenshot() for each in page.locator(".workbench-still img").all()[:3]]
    return {Image.open(BytesIO(shot)).convert("RGB").getpixel((2, 2)) for shot in shots}


def test_a_trusted_notebook_opened_without_its_kernel_shows_pictures(run: tuple[Page, Watch], again: Page) -> None:
    run[0].evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page = again
    open_instead(page, "views.ipynb")
    assert page.evaluate("window.jupyterapp.shell.currentWidget.content.model.cells.get(1).trusted")
    page.locator(".workbench-still").first.wait_for()
    shown = "[...document.querySelectorAll('.workbench-still img')].filter(i => i.offsetWidth > 100).length"
    page.wait_for_function(f"{shown} === {len(VIEWS)}")
    command(page, "apputils:change-theme", theme="JupyterLab Dark")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    card = """(() => { const card = getComputedStyle(document.querySelector('.workbench-still'));
        return [card.backgroundColor, card.color, card.paddingLeft, card.borderRadius]; })()"""
    assert page.evaluate(card) == ["rgb(20, 23, 27)", "rgb(228, 232, 236)", "12px", "8px"]
    assert _papers(page) == {(20, 23, 27)}
    page.emulate_media(media="print")
    assert page.evaluate(card)[:2] == ["rgb(255, 255, 255)", "rgb(28, 33, 39)"]
    page.emulate_media(media="screen")
    command(page, "apputils:change-theme", theme="JupyterLab Light")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'true'")
    assert _papers(page) == {(255, 255, 255)}
    assert "model not found" not in page.locator(".jp-Notebook").inner_text()


def test_nbconvert_shows_the_pictures_as_they_were_saved(saved: Any, lab: tuple[str, Path], browser: Browser) -> None:
    file = lab[1] / "convert.html"
    file.write_text(HTMLExporter().from_notebook_node(saved)[0], encoding="utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(file.as_uri(), wait_until="domcontentloaded")
    shown = "[...document.querySelectorAll('.workbench-still img')].filter(i => i.offsetWidth > 100).length"
    page.wait_for_function(f"{shown} === {len(VIEWS)}")
    sources = page.evaluate("[...document.querySelectorAll('.workbench-still img')].map((image) => image.src)")
    outputs = [output.data for cell in saved.cells for output in cell.outputs if "data" in output]
    kept = ["".join(data["image/png"].split()) for data in outputs if "image/png" in data]
    assert sources == [f"data:image/png;base64,{picture}" for picture in kept]  # of what was chosen last
    context.close()
