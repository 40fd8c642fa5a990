"""The page in a browser: opened from disk, offline, by address, by mouse, with hostile tokens, on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.axe import axe_violations
from support.browser import settled
from support.hostile import HOSTILE
from workbench import views
from workbench.report import Report, check

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from support.browser import WatchedPage

pytestmark = pytest.mark.browser

WORDS = [" The", " cat", " saw", " the", " dog", "\n", " The", " cat", " ran"]
WIDTHS = [420, 768, 1280, 1920]


@pytest.fixture(scope="module")
def report(make_capture: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    words = "Two *heads* copy, see [the paper](https://example.org/a).\n\n| head | score |\n|---|---|\n| L0H1 | 0.5 |"
    made = Report("Heads", question="Which heads copy?", answer="**Two** do.").add(words, title="What was done")
    return made.add(make_capture(WORDS), text="The cat saw the dog", note="A *note*.").write(path)


@pytest.fixture
def requests(page: WatchedPage) -> list[str]:
    """Addresses of everything the page asks for, files too."""
    asked: list[str] = []
    page.page.on("request", lambda request: asked.append(request.url))
    return asked


@pytest.fixture
def opened(page: WatchedPage, report: Path, requests: list[str]) -> Iterator[Page]:
    """The report in the browser; at the end it must have logged no error and asked for nothing but itself."""
    yield _open(page, report)
    page.assert_clean()
    assert {address.partition("#")[0] for address in requests} == {report.resolve().as_uri()}


def _open(page: WatchedPage, path: Path, words: str = "") -> Page:
    page.page.goto("about:blank")
    page.page.goto(path.resolve().as_uri() + words)
    page.page.wait_for_selector("html[data-ready]")
    return page.page


def _shown_head(page: Page, at: int = 0) -> str:
    return page.locator(".attention_pattern .panel figcaption").nth(at).inner_text()


def test_every_figure_is_drawn_with_its_number_caption_and_downloads(opened: Page) -> None:
    figures = opened.locator(".figures > figure")
    captions = [text.split(".")[0] for text in figures.locator("> figcaption").all_inner_texts()]
    assert captions == [f"Figure {n}" for n in range(1, figures.count() + 1)]
    assert figures.count() == 3
    for i in range(figures.count()):
        figure = figures.nth(i)
        assert figure.locator(".workbench > .caption").first.inner_text()
        assert figure.get_by_role("button", name="JSON").is_visible()
        assert not figure.locator(".workbench > .title").is_visible()
        assert figure.locator(".scriptless").count() == 0
    assert opened.locator("h1").count() == 1


def test_a_head_chosen_in_the_atlas_is_the_one_of_the_pattern(opened: Page) -> None:
    opened.locator(".head_atlas .ranking button").nth(1).click()
    name = opened.locator(".head_atlas .ranking button b").nth(1).inner_text()
    assert _shown_head(opened).startswith(name)
    assert opened.url.partition("#")[2].split(",")[:2] == ["fig-1-head-atlas", name]


def test_the_contents_can_be_skipped_and_lead_to_the_figures(opened: Page) -> None:
    stops = opened.evaluate("[...document.querySelectorAll('main a[href], main select')].map(each => each.textContent)")
    assert stops.index("Skip the contents") == 1 + stops.index("as the systemlightdark")
    opened.get_by_role("link", name="Skip the contents").press("Enter")
    assert opened.url.endswith("#section-1")
    link = opened.locator(".contents").get_by_role("link", name="Attention pattern")
    link.click()
    assert opened.url.endswith("#fig-2-attention-pattern")
    assert abs(opened.locator("#fig-2-attention-pattern").evaluate("f => f.getBoundingClientRect().top")) < 30


def test_an_address_restores_place_and_selection(page: WatchedPage, report: Path) -> None:
    opened = _open(page, report, "#L1H2,q=4")
    assert _shown_head(opened).startswith("L1H2")
    assert "(4)" in opened.locator(".attention_pattern .row h3").inner_text()
    assert opened.evaluate("scrollY") == 0
    opened = _open(page, report, "#fig-2-attention-pattern,L0H1,q=3")
    assert _shown_head(opened).startswith("L0H1")
    assert "(3)" in opened.locator(".attention_pattern .row h3").inner_text()
    assert abs(opened.locator("#fig-2-attention-pattern").evaluate("f => f.getBoundingClientRect().top")) < 30
    opened.evaluate("location.hash = 'L1H0,q=2'")
    opened.wait_for_function("() => document.querySelector('.attention_pattern .row h3').innerText.includes('(2)')")
    assert _shown_head(opened).startswith("L1H0")
    opened.evaluate("location.hash = 'section-1'")
    settled(opened)
    assert _shown_head(opened).startswith("L1H0")
    page.assert_clean()


@pytest.mark.parametrize(
    "words", ["#L9H9,q=99", "#fig-9-x,L0H99", "#%%%", "#__proto__", "#L0H1,q=-1,k=x", "#<img src=x>", "#constructor,L1"]
)
def test_a_wrong_address_does_no_harm(page: WatchedPage, report: Path, words: str) -> None:
    opened = _open(page, report, words)
    assert _shown_head(opened).startswith("L")
    assert opened.locator(".workbench canvas").first.is_visible()
    page.assert_clean()


def test_hostile_tokens_are_text_and_nothing_more(page: WatchedPage, make_capture: Any, tmp_path: Path) -> None:
    dialogs: list[str] = []
    page.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    bad = "".join(HOSTILE)
    capture = make_capture(list(HOSTILE), provenance={"model_name": bad, "prompt": bad}, name="site<img>.{}")
    made = Report(bad, question=bad, answer=bad).add(capture, text=bad, note=bad, title=bad).add(bad)
    path = made.write(tmp_path / "hostile.html")
    assert check(path) == []
    opened = _open(page, path)
    tokens = opened.locator(".token_strip .strip .token")
    for token in tokens.all():
        token.hover()
        token.click()
    assert opened.evaluate("window.__pwn") is None
    assert dialogs == []
    assert opened.locator("main img, main svg, main b:not(.ranking b)").count() == 0
    assert opened.locator("main a:not([href^='#'])").count() == 0
    shown = opened.locator(".token_strip .strip .token").evaluate_all("all => all.map(t => t.ariaLabel)")
    for text, visible in zip(shown, HOSTILE.values(), strict=True):
        assert visible[:39] in text
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.assert_clean()


def test_what_is_put_into_the_page_does_not_run(page: WatchedPage, report: Path) -> None:
    opened = _open(page, report)
    with opened.expect_event("console", lambda _: len(page.errors) == 3):  # the script, the handler, the picture
        opened.evaluate(
            """() => {
                const script = document.createElement("script");
                script.textContent = "window.__pwn = 1";
                document.body.append(script);
                const picture = "<img src='https://example.org/x.png' onerror='window.__pwn=2'>";
                document.body.insertAdjacentHTML("beforeend", picture);
            }"""
        )
    settled(opened)
    assert opened.evaluate("window.__pwn") is None
    assert opened.evaluate("document.querySelector('img').naturalWidth") == 0
    blocked = [error for error in page.errors if "Content Security Policy" in error]
    assert len(blocked) == len(page.errors) == 3


def test_towers_and_cross_attention_are_there(page: WatchedPage, translation_capture: Any, tmp_path: Path) -> None:
    opened = _open(page, Report("t").add(translation_capture).write(tmp_path / "page.html"))
    labels = opened.locator(".head_atlas .map figcaption").all_inner_texts()
    assert labels == ["Encoder self-attention", "Decoder self-attention", "Cross-attention"]
    facts = opened.locator(".about .facts").inner_text()
    for part in ("encoder self: 30 queries × 30 keys", "decoder cross: 7 queries × 30 keys"):
        assert part in facts
    page.assert_clean()


def test_long_inputs_say_that_they_are_pooled(page: WatchedPage, make_capture: Any, tmp_path: Path) -> None:
    many = make_capture(length=300, layers=1, heads=4, statistics=["entropy"])
    report = Report("t")
    for _ in range(12):
        report.add(many)
    opened = _open(page, report.write(tmp_path / "page.html"))
    assert "block" in opened.locator(".attention_pattern .notes").first.inner_text()
    assert "block" in opened.locator("#limits").inner_text()
    page.assert_clean()


def test_a_capture_without_patterns_still_shows_its_heads(page: WatchedPage, make_capture: Any, tmp_path: Path) -> None:
    opened = _open(page, Report("t").add(make_capture(WORDS, keep=False)).write(tmp_path / "page.html"))
    assert opened.locator(".head_atlas canvas").count() == 1
    assert opened.locator(".attention_pattern").count() == 0
    assert "patterns of 2 sites were not kept" in opened.locator("#limits").inner_text()
    page.assert_clean()


def test_two_captures_follow_one_selection(page: WatchedPage, make_capture: Any, tmp_path: Path) -> None:
    path = Report("t").add(make_capture(WORDS)).add(make_capture(WORDS[:5], layers=1)).write(tmp_path / "page.html")
    opened = _open(page, path, "#L0H2,q=1")
    assert [_shown_head(opened, i)[:4] for i in range(2)] == ["L0H2", "L0H2"]
    opened.evaluate("location.hash = 'L1H1'")  # which the second has not
    opened.wait_for_function("() => document.querySelector('.panel figcaption').innerText.startsWith('L1H1')")
    assert _shown_head(opened, 1).startswith("L0")
    page.assert_clean()


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out_of_the_page(page: WatchedPage, report: Path, width: int) -> None:
    page.page.set_viewport_size({"width": width, "height": 800})
    opened = _open(page, report)
    for details in opened.locator("details").all():
        details.evaluate("each => { each.open = true; }")
    settled(opened)
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    page.assert_clean()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_there_is_nothing_for_axe_to_report(page: WatchedPage, report: Path, scheme: Any) -> None:
    page.page.emulate_media(color_scheme=scheme)
    opened = _open(page, report)
    for details in opened.locator("details").all():
        details.evaluate("each => { each.open = true; }")
    assert axe_violations(opened) == []


def _brightness(page: Page, selector: str) -> float:
    script = (
        "e => getComputedStyle(e).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) / 3"
    )
    return float(page.locator(selector).first.evaluate(script))


def test_themes_follow_the_system_the_choice_and_paper(page: WatchedPage, report: Path) -> None:
    opened = _open(page, report)

    def light() -> tuple[bool, bool, bool]:
        settled(opened)
        return (
            _brightness(opened, "html") > 128,
            _brightness(opened, ".contents") > 128,
            _brightness(opened, ".workbench") > 128,
        )

    assert light() == (True, True, True)
    opened.emulate_media(color_scheme="dark")
    assert light() == (False, False, False)
    opened.emulate_media(media="print", color_scheme="dark")
    assert light() == (True, True, True)
    assert not opened.locator(".theme").is_visible()
    opened.emulate_media(media="screen", color_scheme="light")
    opened.get_by_label("Theme").select_option("dark")
    assert light() == (False, False, False)
    page.assert_clean()


def test_without_scripts_words_sites_and_first_rows_are_there(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False, offline=True)
    opened = context.new_page()
    opened.goto(report.resolve().as_uri())
    assert opened.get_by_text("needs JavaScript").first.is_visible()
    assert opened.locator("details.table[open] tbody tr").count() == 2
    assert opened.get_by_text("Two heads copy").is_visible()
    assert opened.locator("figure .scriptless table").count() == 3
    assert opened.locator("figure .scriptless tbody tr").first.is_visible()
    context.close()


def test_a_chart_brings_plotly_once_and_no_share_button(page: WatchedPage, tmp_path: Path) -> None:
    import plotly.graph_objects as go

    chart = views.figure(go.Figure(go.Scatter(x=[0, 1], y=[1, 0])), title="Curve", caption="A line.")
    path = Report("t").add(chart).add(chart).write(tmp_path / "chart.html")
    assert check(path) == []
    assert path.stat().st_size < 2_000_000
    opened = _open(page, path)
    assert opened.locator(".js-plotly-plot").count() == 2
    assert opened.locator("[data-title^='Share']").count() == 0
    assert opened.locator("#fig-1-curve").count() == 1
    page.assert_clean()
