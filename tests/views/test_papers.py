"""Figures for papers: SVG and PDF with their words around them, the same every time."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from playwright.sync_api import Browser, Locator

from support import pdf
from support.browser import WatchedPage, settled
from support.every_view import FIGURES, FORMS, VIEWS, WITH_TOKENS, made, page_of
from support.hostile import HOSTILE
from workbench import views
from workbench.views import token_strip
from workbench.views.base import drawing, modules
from workbench.views.base.kinds import kind_of
from workbench.views.base.spec import origin_line
from workbench.views.base.widget import answer_of
from workbench.views.head_gallery import Axes

SVG = "{http://www.w3.org/2000/svg}"
AXES: dict[str, tuple[str, ...]] = {
    "saliency_map": ("mel channel", "0.8 s", "Cross-attention and input saliency"),
    "capacity_curves": ("stored pairs n", "SNR, dB", "direction, strongest first", "theory for Hebb, d_k"),
    "conditioning_curves": ("trials seen", "outcome expected after B", "hebb"),
    "what_if": ("stored pairs n", "power, dB", "layers L", "chance of failure"),
    "table": ("mechanism", "distance"),
    "tensor_peek": ("axis 1 ↓, axis 2 →", "value", "numbers"),
    "figure": ("epoch", "loss, nats"),
    "run_timeline": ("forward 0", "thread 0", "our statistics"),
    "compare": ("query ↓, key →", "weight, square-root scale"),
    "attention_pattern": ("queries ↓, keys →", "weight, square-root scale", "not visible to the query"),
    "head_atlas": ("layers ↓, heads →", "Entropy, nats", "not known"),
    "head_gallery": ("rows down", "columns to the right", "weight"),
    "head_page": ("Statistics", "value", "rank"),
    "image_attention": ("weight; each small map goes to its own largest",),
    "grounding": ("weight per pixel; each small map of a head goes to its own largest",),
    "token_strip": ("received",),
    "circuit_graph": ("score: sum of |score|", "not scored", "positive edge", "negative edge", "wider: stronger"),
    "overlap_matrix": ("Jaccard: items in both", "node shared", "node only one"),
    "playground": ("queries ↓, keys →", "layers ↓, heads →", "Before", "After", "weight, square-root scale"),
    "half-lives": ("layers ↓, heads →", "log₂ half-life, positions"),
    "states": ("position", "channel", "size"),
    "content and decay": ("queries ↓, keys →", "|A| / Σ|A|, square-root scale"),
    "two mechanisms": ("query ↓, key →", "weight, square-root scale"),
    "two atlases": ("layer ↓, head →", "nats, square-root scale"),
    "head wall": ("query", "key", "weight, square-root scale"),
    "causal map": ("share of the token's largest",),
    "overlap graph": ("node shared", "node only one", "wider: stronger"),
    "windows": ("weight; each small map goes to its own largest",),
    "gates": ("layers ↓, heads →", "mean factor"),
    "eviction": ("layers ↓, heads →", "weight lost, share"),
    "gates over positions": ("row", "column"),
    "eviction by query": ("query", "share of its weight", "key", "weight lost"),
    "spikes": ("step", "neurons", "rate"),
    "spike raster": ("step", "neurons"),
    "memory timeline": ("frame", "remembered frame", "weight"),
    "memory tree": ("frame behind the prompt", "score, from the best of the frame", "believed"),
    "exhibit": ("head", "key", "step", "share"),
    "energy": ("layer", "nanojoules per example", "as it runs"),
}
"""Kind of view, form or figure -> names of axes and legends that a figure of it has."""
FOR_THE_SCREEN = ("Its page", "Show more", "Start again", "Point at a node", "Choose an output", "stands still here")
"""What nobody can press or do on paper."""
PICTURED: dict[str, tuple[str, ...]] = {
    "capacity_curves": ("stored pairs n", "SNR, dB", "direction", "share of power"),
    "conditioning_curves": ("trials seen", "outcome expected"),
    "what_if": ("pairs n", "power, dB", "layers L", "chance"),
    "tensor_peek": ("axis 1", "axis 2", "value", "numbers"),
    "run_timeline": ("host time",),
    "compare": ("query", "key", "weight, square-root scale"),
    "attention_pattern": ("query", "key", "weight, square-root scale"),
    "head_atlas": ("head", "Entropy (nats)"),
    "head_gallery": ("rows down ↓, columns to the right →",),
    "head_page": ("share of the largest magnitude",),
    "saliency_map": ("mel channel", "seconds"),
    "image_attention": ("weight from CLS",),
    "circuit_graph": ("score: sum of |score|",),
    "overlap_matrix": ("Jaccard",),
    "playground": ("query", "key", "probability", "layer", "head"),
    "states": ("channel ↓, position →",),
    "head wall": ("query ↓, key →",),
    "two atlases": ("layer", "head", "nats"),
}
"""The same for the pictures that Python draws."""


def sized(svg: bytes) -> tuple[float, float]:
    _, _, width, height = map(float, ET.fromstring(svg).attrib["viewBox"].split())
    return width, height


@pytest.mark.parametrize("kind", VIEWS)
def test_every_view_is_a_drawing_with_words_around_it(kind: str, tmp_path: Path) -> None:
    view = made(kind)
    bare, worded = view.to_svg(words=False), view.to_svg()
    assert isinstance(bare, bytes)
    assert isinstance(worded, bytes)
    assert view.to_svg(words=False) == bare  # at other places in memory
    assert b"clip-path" not in bare or bare.count(b"url(#clip0)")
    assert b"<script" not in worded
    assert sized(worded)[1] > sized(bare)[1] + 20
    file = view.to_pdf(tmp_path / "figure.pdf")
    assert isinstance(file, Path)
    assert file.read_bytes().startswith(b"%PDF")


def test_the_background_can_be_left_out() -> None:
    from PIL import Image

    view = token_strip(["a", "b"], [0.0, 1.0])
    corners = [
        Image.open(BytesIO(view.to_png(words=True, transparent=clear))).convert("RGBA").getpixel((0, 0))
        for clear in (True, False)
    ]
    assert [corner[3] for corner in corners] == [0, 255]
    assert len(view.to_svg(transparent=True)) != len(view.to_svg())


def test_hostile_words_are_drawn_as_text() -> None:
    view = token_strip(["a"], [1.0], title=next(iter(HOSTILE)), caption=" ".join(HOSTILE))
    assert ET.fromstring(view.to_svg()).tag == f"{SVG}svg"


def test_the_origin_names_every_model_once() -> None:
    model = {"model_name": "gpt2", "weights_sha256": "0123456789abcdef"}
    assert origin_line({"a": model, "b": model}).startswith("gpt2, weights 0123456789ab; attention-workbench ")
    assert origin_line({}).startswith("attention-workbench ")


@pytest.mark.parametrize("kind", PICTURED)
def test_pictures_name_their_axes(kind: str) -> None:
    seen: list[str] = []

    def draw(figure: Figure) -> None:
        made(kind).picture(figure)
        seen.extend(each.get_text() for each in figure.findobj(Text) if each.get_visible())

    drawing.png(draw, made(kind).size, theme="light", dpi=50)
    words = " ".join(seen)
    assert [name for name in PICTURED[kind] if name not in words] == []


def test_axes_of_every_view_are_known() -> None:
    assert sorted(AXES) == sorted([*VIEWS, *FORMS, *FIGURES])


MOST_SHAPES = 5_000
Show = Callable[[str], tuple[WatchedPage, Locator]]
PIXELS = "view => [...view.querySelectorAll('.workbench canvas')].map((canvas) => canvas.toDataURL())"


@cache
def together(plotly: bool) -> list[str]:
    """What stands on one page: that page's policy lets plotly in, or not."""
    return [name for name in AXES if kind_of(made(name).spec.kind).plotly == plotly]


@pytest.fixture(scope="module")
def shown(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Show]:
    """The page and the place on it of a kind of view, form or figure; the page is opened once."""
    folder = tmp_path_factory.mktemp("papers")
    opened: dict[bool, WatchedPage] = {}

    def show(kind: str) -> tuple[WatchedPage, Locator]:
        plotly = kind in together(True)
        if plotly not in opened:
            context = browser.new_context(offline=True, color_scheme="dark", viewport={"width": 1100, "height": 800})
            opened[plotly] = WatchedPage(context.new_page())
            path = page_of(together(plotly), folder / f"{plotly}.html")
            opened[plotly].open(path).wait_for_selector("html[data-ready]")
        at = together(plotly).index(kind)
        return opened[plotly], opened[plotly].page.locator(f"[data-view='view-{at}']")

    yield show
    for watched in opened.values():
        watched.page.context.close()


def letters(texts: Iterable[str]) -> str:
    """What is written, without spaces: lines are broken where they may be."""
    return "".join("".join(texts).split())


@pytest.mark.browser
@pytest.mark.parametrize("kind", [*VIEWS, *FORMS, *FIGURES])
def test_the_pages_buttons_give_the_whole_figure_on_white(kind: str, shown: Show) -> None:
    """Title, axes, legends, caption and origin as text in an SVG and a PDF, and as a PNG of twice the size; offline."""
    from PIL import Image

    view = made(kind)
    watched, place = shown(kind)
    before = place.evaluate(PIXELS)
    files = {}
    for form in ("SVG", "PDF", "PNG"):
        found = watched.file(place.get_by_role("button", name=form, exact=True).first, f".{form.lower()}")
        files[form] = found.read_bytes()
    settled(watched.page)
    assert place.evaluate(PIXELS) == before  # the page is as it was
    watched.assert_clean()
    drawing = ET.fromstring(files["SVG"])
    words = " ".join("".join(text.itertext()) for text in drawing.iter(f"{SVG}text"))
    for wanted in (
        view.spec.title,
        " ".join(view.spec.caption.split()),
        *view.spec.notes,
        view.spec.to_static()["origin"],
    ):
        assert " ".join(wanted.split()) in words
    width, height = sized(files["SVG"])
    with Image.open(BytesIO(files["PNG"])) as picture:
        assert picture.size == (2 * width, 2 * height)
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    inside = [each for each in drawing.iter() if each.tag in (f"{SVG}path", f"{SVG}image", f"{SVG}rect")]
    assert 4 < len(inside) < MOST_SHAPES  # more than the paper; what has one colour is one shape
    paper = pdf.read(files["PDF"])
    assert paper.title == view.spec.title
    assert paper.size == pytest.approx((0.75 * width, 0.75 * height))  # points of pixels
    assert letters(paper.texts) == letters("".join(text.itertext()) for text in drawing.iter(f"{SVG}text"))
    assert [name for name in AXES[kind] if letters([name]) not in letters(paper.texts)] == []
    assert [name for name in FOR_THE_SCREEN if letters([name]) in letters(paper.texts)] == []
    assert paper.bare == []  # every character has its outline
    lines = paper.content.split("\n")
    assert lines.count("q") == lines.count("Q") > 4
    if kind == "attention_pattern":
        assert len(paper.pictures) == 1  # the map; the lines from the query are lines
    assert (len(paper.pictures) > 0) == any(each.tag == f"{SVG}image" for each in drawing.iter())


def _paper(page: WatchedPage, view: views.View, path: Path) -> bytes:
    """The PDF of a view on a page."""
    tab = page.open(Path(view.to_html(path)))
    tab.wait_for_selector("html[data-ready]")
    with tab.expect_download() as download:
        tab.get_by_role("button", name="PDF", exact=True).click()
    return Path(download.value.path()).read_bytes()


@pytest.mark.browser
def test_what_scrolls_on_a_page_is_whole_on_paper(page: WatchedPage, tmp_path: Path) -> None:
    page.page.set_viewport_size({"width": 500, "height": 700})
    names = [f"column {i}" for i in range(24)]
    view = views.table(["a", "b"], [views.Column(name, [1.0, 2.0]) for name in names])
    found = pdf.read(_paper(page, view, tmp_path / "view.html"))
    table = page.page.locator(".shaded").evaluate("each => each.getBoundingClientRect().width")
    assert table > 1000
    assert found.size[0] == pytest.approx(0.75 * table, abs=20)
    wide = page.page.locator(".wide").evaluate("each => [each.clientWidth < 500, each.scrollWidth > 1000]")
    assert wide == [True, True]  # the page is as it was
    page.assert_clean()


@pytest.mark.browser
def test_pixels_of_small_maps_are_told_apart_on_paper(page: WatchedPage, tmp_path: Path) -> None:
    maps = np.random.default_rng(0).random((3, 5, 7))
    view = views.head_gallery(maps, [(0, 0), (0, 1), (1, 0)], axes=Axes("row", "column"))
    data = _paper(page, view, tmp_path / "view.html")
    pictures = [each for each in pdf.objects(data).values() if "/Subtype /Image" in each.words]
    assert len(pictures) >= 3
    assert not [each for each in pictures if "/Interpolate true" in each.words]
    assert all(min(size) >= 5 * 37 for size in pdf.read(data).pictures)  # each cell 37 pixels wide
    page.assert_clean()


@pytest.mark.browser
def test_a_hostile_figure_is_text_and_nothing_more(page: WatchedPage, tmp_path: Path) -> None:
    tab = page.open(Path(WITH_TOKENS["attention_pattern"](tuple(HOSTILE)).to_html(tmp_path / "view.html")))
    tab.wait_for_selector("html[data-ready]")
    with tab.expect_download() as download:
        tab.get_by_role("button", name="SVG", exact=True).click()
    drawing = ET.fromstring(Path(download.value.path()).read_bytes())
    allowed = {"svg", "title", "rect", "text", "g", "path", "image", "clipPath", "linearGradient", "stop"}
    assert {each.tag.removeprefix(SVG) for each in drawing.iter()} <= allowed
    assert not [name for each in drawing.iter() for name in each.attrib if name.lower().startswith("on")]
    with tab.expect_download() as download:
        tab.get_by_role("button", name="PDF", exact=True).click()
    data = Path(download.value.path()).read_bytes()
    found = pdf.read(data)
    assert letters(found.texts) == letters("".join(text.itertext()) for text in drawing.iter(f"{SVG}text"))
    acts = ("/JavaScript", "/JS", "/OpenAction", "/AA", "/URI", "/Launch", "/Annots", "/EmbeddedFile")
    assert not [name for each in pdf.objects(data).values() for name in acts if name in each.words]
    page.assert_clean()


SCRIPTS = [
    *("plain text", "naïve Å", "Ωμέγα", "Привет", "日本語", "한국어", "العربية", "עברית", "हिन्दी", "ไทย"),
    *("😀👩\u200d👩\u200d👧", "−0.5 → ∞ ␣"),
]


@pytest.mark.browser
def test_a_pdf_has_every_script_as_text(page: WatchedPage, tmp_path: Path) -> None:
    """Letters as outlines that one can copy; what has colours of its own as a picture with its text behind it."""
    strip = token_strip(SCRIPTS, np.linspace(0, 1, len(SCRIPTS)), title="Scripts")
    tab = page.open(Path(strip.to_html(tmp_path / "view.html")))
    tab.wait_for_selector("html[data-ready]")
    with tab.expect_download() as download:
        tab.get_by_role("button", name="PDF", exact=True).click()
    found = pdf.read(Path(download.value.path()).read_bytes())
    for text in strip.spec.facts["tokens"]:
        assert letters([text]) in letters(found.texts), text
    coloured = [text for text in found.bare if not re.search("[\U0001f000-\U0001ffff]", text)]
    assert coloured == []
    page.assert_clean()


KERNEL = """
const heard = new Set();
const values = { spec: SPEC, selection: {}, still: [], live: true, state: {} };
const model = {
  get: (name) => values[name], set() {}, save_changes() {},
  on: (name, call) => name === "msg:custom" && heard.add(call), off: (_, call) => heard.delete(call),
  send: async (question) => {
    const bytes = new TextEncoder().encode(await answer(question));
    for (const call of [...heard]) call({ number: question.number }, [new DataView(bytes.buffer)]);
  },
};
render({ model, el: document.body });
"""


@pytest.mark.browser
@pytest.mark.usefixtures("released")
def test_a_live_view_has_its_kernel_hand_over_what_draws_figures(page: WatchedPage) -> None:
    """Once, and not before it is wanted; as a release has it."""
    view, asked = made("token_strip"), []

    def answer(question: dict[str, Any]) -> str:
        asked.append(question["ask"])
        return answer_of(view, question)[1][0].decode()

    tab = page.page
    tab.expose_function("answer", answer)
    tab.set_content("<!doctype html><html lang=en><title>live</title><body></body>")
    code = modules.live("token_strip").replace("export default", "const { render } =")
    spec = json.dumps(view.spec.to_static()).replace("<", "\\u003c")
    tab.add_script_tag(content=f"(() => {{ {code}\n{KERNEL.replace('SPEC', spec, 1)} }})();")
    tab.locator(".workbench .token").first.wait_for()
    assert asked == []
    for form in ("SVG", "SVG", "PNG", "PDF", "PDF"):
        with tab.expect_download() as download:
            tab.get_by_role("button", name=form, exact=True).click()
        found = Path(download.value.path()).read_bytes()
        words = {
            "SVG": lambda file: "".join(ET.fromstring(file).itertext()),
            "PDF": lambda file: " ".join(pdf.read(file).texts),
            "PNG": lambda file: view.spec.title if file.startswith(b"\x89PNG") else "",
        }
        assert view.spec.title in words[form](found)
    assert asked == ["module", "module"]  # what draws figures, and what makes a PDF of them
    page.assert_clean()
