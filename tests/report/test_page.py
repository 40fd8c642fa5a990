"""The page in a browser: opened from disk, offline, by mouse, by keyboard, by address, with hostile tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from workbench.report import Report

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from support.browser import WatchedPage

pytestmark = pytest.mark.browser

WORDS = [" The", " cat", " saw", " the", " dog", "\n", " The", " cat", " ran"]
HOSTILE = [
    "</script><script>window.hurt=1</script>",
    "<img src=x onerror=window.hurt=1>",
    '"><svg onload=window.hurt=1>',
    '<a href="javascript:window.hurt=1">x</a>',
    "'; window.hurt=1; //",
    "\u2028\u2029",
    "\u202eabc",
    "\x00\x1b",
    "\ud83d",
    "-->",
    "<!--",
    "${window.hurt=1}",
    "{{ 7*7 }}",
    "&lt;b&gt;",
    "x" * 5000,
    "",
    " ",
    "\n",
    "\t",
    "__proto__",
]


@pytest.fixture(scope="module")
def report(make_capture: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    return Report("Heads").add(make_capture(WORDS)).write(path)


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
    page.page.goto(path.resolve().as_uri() + words)
    page.page.wait_for_selector("html[data-ready]")
    return page.page


def _point(page: Page, query: int, key: int) -> None:
    """Put the pointer on a cell of the first pattern."""
    spot = page.evaluate(
        """([row, column]) => {
            const canvas = document.querySelector("canvas");
            const box = DOMRect.fromRect(canvas.getBoundingClientRect());
            const edge = Number(canvas.dataset.edge), w = Number(canvas.dataset.cell);
            scrollTo(0, scrollY + box.top - 100);
            box.y = canvas.getBoundingClientRect().top;
            return [box.left + edge + (column + 0.5) * w, box.top + edge + (row + 0.5) * w];
        }""",
        [query, key],
    )
    page.mouse.move(*spot)


def test_clicking_a_head_shows_its_pattern(opened: Page) -> None:
    opened.get_by_role("gridcell", name="layer 1 head 2").click()
    assert opened.locator(".pattern h3").inner_text().startswith("L1H2")
    assert opened.locator("td.chosen").get_attribute("aria-selected") == "true"
    assert "head=2" in opened.url


def test_each_metric_recolours_the_map_and_names_its_unit(opened: Page, make_capture: Any) -> None:
    capture = make_capture(WORDS)
    for name, unit in (("sink", "mass"), ("distance", "tokens"), ("entropy", "nats")):
        opened.get_by_label("Metric").select_option(name)
        value = float(capture["model.layers.0.self_attn"].statistics[name][0, 1].double().nanmean())
        said = opened.locator('[data-site="0"][data-head="1"]').get_attribute("aria-label") or ""
        assert said.endswith(unit)
        assert float(said.split()[-2]) == pytest.approx(value, rel=1e-5)
        assert unit in opened.locator(".heads .legend").inner_text()


def test_colours_follow_the_values(opened: Page) -> None:
    opened.get_by_label("Metric").select_option("peak")
    cells = opened.locator("td[data-site]").evaluate_all(
        "cells => cells.map(c => [parseFloat(c.ariaLabel.split(' ').at(-2)), getComputedStyle(c).backgroundColor])"
    )
    # Green grows along the whole of the scale.
    greens = [int(colour.removeprefix("rgb(").split(",")[1]) for _, colour in sorted(cells)]
    assert greens == sorted(greens)
    assert len(set(greens)) > 1


def test_keys_move_over_the_map_and_choose(opened: Page) -> None:
    opened.locator("td.chosen").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "Enter"):
        opened.keyboard.press(key)
    assert opened.locator(".pattern h3").inner_text().startswith("L1H1")
    assert opened.locator('.map [tabindex="0"]').count() == 1


def test_keys_move_over_the_pattern(opened: Page) -> None:
    canvas = opened.locator("canvas")
    canvas.focus()
    for key in ("Home", "ArrowUp", "ArrowUp"):
        opened.keyboard.press(key)
    assert "“␣The” (6) → “␣The” (0)" in opened.locator(".readout").inner_text()
    opened.keyboard.press("Enter")
    assert "query=6" in opened.url
    assert opened.locator('.strip [aria-selected="true"]').get_attribute("data-at") == "6"


def test_hover_names_both_tokens_and_the_exact_weight(opened: Page, make_capture: Any) -> None:
    row = make_capture(WORDS)["model.layers.0.self_attn"].weights[0, 0, 4]
    key = int(row.argmax())
    _point(opened, 4, key)
    said = opened.locator("#tooltip").inner_text()
    assert "“␣dog” (4) →" in said
    assert float(said.split()[-1]) == pytest.approx(float(row[key]), abs=6e-7)
    _point(opened, 2, 7)
    assert "not visible to this query" in opened.locator("#tooltip").inner_text()


def test_clicking_a_row_or_a_token_shows_its_largest_weights(opened: Page, make_capture: Any) -> None:
    weights = make_capture(WORDS)["model.layers.0.self_attn"].weights[0, 0]
    for query, choose in (
        (5, lambda: (_point(opened, 5, 1), opened.mouse.down(), opened.mouse.up())),
        (3, lambda: opened.locator('.strip [data-at="3"]').click()),
    ):
        choose()
        shown = opened.locator(".top tbody tr").evaluate_all(
            "rows => rows.map(r => [+r.cells[0].innerText, +r.cells[2].innerText])"
        )
        best = weights[query].topk(query + 1)
        assert [key for key, _ in shown] == best.indices.tolist()
        assert [weight for _, weight in shown] == pytest.approx(best.values.tolist(), abs=6e-7, rel=1e-3)


def test_every_byte_of_the_pattern_arrives(opened: Page, make_capture: Any) -> None:
    """The picture itself: the colour of each cell is that of its weight, read from the canvas."""
    weights = make_capture(WORDS)["model.layers.0.self_attn"].weights[0, 0]
    opened.get_by_label("Scale").select_option("linear")
    opened.get_by_label("Colours run").select_option("one")
    opened.mouse.move(1, 1)
    greens = opened.locator("canvas").evaluate(
        """(canvas) => {
            const ink = canvas.getContext("2d"), edge = +canvas.dataset.edge, w = +canvas.dataset.cell;
            const at = (i) => edge + (i + 0.5) * w;
            const green = (i) => ink.getImageData(at(i % 9), at(Math.floor(i / 9)), 1, 1).data[1];
            return Array.from({ length: 81 }, (_, i) => green(i));
        }"""
    )
    for i, green in enumerate(greens):
        query, key = divmod(i, 9)
        if key > query:
            assert green == 0xE9  # the colour of what is not visible
        elif weights[query, key] < 0.01:
            assert green < 8
        elif weights[query, key] > 0.95:
            assert green > 210


def test_hiding_the_first_key_names_its_mass(opened: Page, make_capture: Any) -> None:
    weights = make_capture(WORDS)["model.layers.0.self_attn"].weights[0, 0]
    box = opened.get_by_label("Hide:")
    box.check()
    label = opened.locator(".check").inner_text()
    assert "Hidden: “␣The” (0)" in label
    assert f"{float(weights[:, 0].mean()):.3f}" in label
    assert f"{float(weights[8, 0]):.4f}"[:5] in opened.locator(".row").inner_text()
    assert "hide=first" in opened.url


def test_an_address_restores_the_view(page: WatchedPage, report: Path) -> None:
    words = "#capture=0&site=model.layers.1.self_attn&head=2&query=4&metric=sink&scale=linear&range=one&hide=first"
    opened = _open(page, report, words)
    assert opened.locator(".pattern h3").inner_text().startswith("L1H2")
    assert opened.locator('.strip [aria-selected="true"]').get_attribute("data-at") == "4"
    assert opened.get_by_label("Metric").input_value() == "sink"
    assert opened.get_by_label("Scale").input_value() == "linear"
    assert opened.get_by_label("Colours run").input_value() == "one"
    opened.evaluate("location.hash = 'capture=0&head=1&query=2'")
    opened.wait_for_function("document.querySelector('.pattern h3').innerText.startsWith('L1H1')")
    page.assert_clean()


@pytest.mark.parametrize(
    "words", ["#capture=9", "#capture=0&site=none&head=99&query=-1&metric=x", "#%%%", "#capture=__proto__"]
)
def test_a_wrong_address_does_no_harm(page: WatchedPage, report: Path, words: str) -> None:
    assert _open(page, report, words).locator(".pattern h3").inner_text().startswith("L0H0")
    page.assert_clean()


def test_hostile_tokens_are_text_and_nothing_more(page: WatchedPage, make_capture: Any, tmp_path: Path) -> None:
    dialogs: list[str] = []
    page.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    bad = HOSTILE[0] + HOSTILE[1]
    capture = make_capture(HOSTILE, provenance={"model_name": bad, "prompt": bad}, name="site<img>.{}")
    path = Report(bad).add(capture, text=bad, note=bad).write(tmp_path / "hostile.html")
    opened = _open(page, path)
    for token in opened.locator(".strip [data-at]").all():
        token.click()
    for i in range(len(HOSTILE)):
        _point(opened, len(HOSTILE) - 1, i)
    assert opened.evaluate("window.hurt") is None
    assert dialogs == []
    assert opened.locator("main img, main svg, main a").count() == 0
    shown = opened.locator(".strip bdi").all_inner_texts()
    assert shown[1] == "<img src=x onerror=wind…"
    assert shown[5:9] == ["⟨U+2028⟩⟨U+2029⟩", "⟨U+202E⟩abc", "⟨U+0000⟩⟨U+001B⟩", "⟨U+D83D⟩"]
    assert shown[15:19] == ["∅", "␣", "⏎", "⇥"]
    assert opened.locator("h1").inner_text() == bad
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.assert_clean()


def test_towers_have_maps_of_their_own_and_cross_attention_two_strips(
    page: WatchedPage, translation_capture: Any, tmp_path: Path
) -> None:
    opened = _open(page, Report("t").add(translation_capture).write(tmp_path / "page.html"))
    assert opened.locator(".map caption").all_inner_texts() == [
        "Encoder self-attention",
        "Decoder self-attention",
        "Cross-attention",
    ]
    opened.get_by_role("gridcell", name="Cross-attention, layer 1 head 3").click()
    assert opened.locator(".strip:visible").count() == 2
    opened.locator('.strip [role="option"]').nth(3).click()
    assert "“␣out3” (3)" in opened.locator(".row h3").inner_text()
    weights = translation_capture["model.decoder.layers.1.encoder_attn"].weights[0, 3, 3]
    assert opened.locator(".top tbody tr td").first.inner_text() == str(int(weights.argmax()))
    page.assert_clean()


def test_long_inputs_say_that_they_are_pooled(page: WatchedPage, make_capture: Any, tmp_path: Path) -> None:
    capture = make_capture(length=300, layers=1, heads=2, statistics=["entropy"])
    opened = _open(page, Report("t").add(capture).write(tmp_path / "page.html"))
    assert "block of 2 × 2 tokens" in opened.locator(".precision").inner_text()
    _point(opened, 100, 30)
    said = opened.locator("#tooltip").inner_text()
    block = float(capture["model.layers.0.self_attn"].weights[0, 0, 200:202, 60:62].max())
    assert "200–201 → 60–61" in said
    assert ("< 0.001" in said) if block < 0.001 else (f"{block:.2f}"[:4] in said or "≈" in said)
    page.assert_clean()


def test_a_capture_without_patterns_still_shows_its_heads(page: WatchedPage, make_capture: Any, tmp_path: Path) -> None:
    opened = _open(page, Report("t").add(make_capture(WORDS, keep=False)).write(tmp_path / "page.html"))
    assert opened.locator("td[data-site]").count() == 6
    assert "not kept" in opened.locator(".pattern").inner_text()
    assert not opened.locator("canvas").is_visible()
    page.assert_clean()


def test_two_captures_are_two_explorers(page: WatchedPage, make_capture: Any, tmp_path: Path) -> None:
    path = Report("t").add(make_capture(WORDS)).add(make_capture(WORDS, layers=1)).write(tmp_path / "page.html")
    opened = _open(page, path, "#capture=1&head=2&query=1")
    titles = opened.locator(".pattern h3").all_inner_texts()
    assert [title[:4] for title in titles] == ["L0H0", "L0H2"]
    page.assert_clean()


@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_sticks_out_of_the_page(page: WatchedPage, report: Path, width: int) -> None:
    page.page.set_viewport_size({"width": width, "height": 800})
    opened = _open(page, report)
    assert opened.evaluate("document.documentElement.scrollWidth") == width


def test_themes_and_paper_recolour_the_canvas(page: WatchedPage, report: Path) -> None:
    opened = _open(page, report)

    def unseen() -> list[int]:
        script = """(c) => Array.from(c.getContext("2d").getImageData(
            +c.dataset.edge + 8.5 * c.dataset.cell, +c.dataset.edge + 0.5 * c.dataset.cell, 1, 1).data)"""
        found: list[int] = opened.locator("canvas").evaluate(script)
        return found

    def switch(**media: Any) -> None:
        page.page.emulate_media(**media)
        # The page hears of it when it is next drawn.
        opened.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    light = unseen()
    switch(color_scheme="dark")
    assert unseen() != light
    switch(media="print", color_scheme="dark")
    assert unseen() == light
    page.assert_clean()


def test_without_scripts_the_sites_are_there(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False, offline=True)
    opened = context.new_page()
    opened.goto(report.resolve().as_uri())
    assert opened.get_by_text("need JavaScript").is_visible()
    assert opened.locator(".sites tbody tr").count() == 2
    context.close()
