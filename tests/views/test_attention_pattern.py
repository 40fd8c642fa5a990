"""What the view shows is what the pattern holds, within the stated error; no peak is lost."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Page

from support.browser import WatchedPage
from support.every_view import capture
from support.tiny import family, make
from workbench import Report, attach
from workbench.errors import CaptureError, ReportError
from workbench.kernels.masks import causal
from workbench.kernels.softmax import SoftmaxPattern
from workbench.views import SharedSelection, attention_pattern, compare, head_atlas, overview
from workbench.views.attention_pattern.pyramid import build, dequantise, quantise
from workbench.views.base import scales


def softmax(n: int, heads: int = 1, seed: int = 0, keys: int | None = None) -> SoftmaxPattern:
    """Causal heads over n queries (at the end of the keys) from random queries and keys."""
    made = torch.Generator().manual_seed(seed)
    keys = n if keys is None else keys
    q, k = torch.randn(1, heads, n, 8, generator=made), torch.randn(1, heads, keys, 8, generator=made)
    return SoftmaxPattern(3 * q, k, causal(n, keys))


def dense(pattern: Any, head: int = 0) -> np.ndarray[Any, Any]:
    """[query, key] in float32, NaN where hidden, by the whole map."""
    weights = pattern.dense()[0, head].float()
    hidden = torch.ones_like(weights, dtype=torch.bool).triu(1 + weights.shape[1] - weights.shape[0])
    return weights.masked_fill(hidden, torch.nan).numpy()


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
def test_bytes_stand_for_weights_within_their_error(weights: list[float]) -> None:
    array = np.array(weights, np.float32)
    assert np.abs(dequantise(quantise(array)) - array).max() <= 1 / 254 + 1e-6
    assert (quantise(array) > 0).all()


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 70), block=st.sampled_from([1, 2, 4, 16]), seed=st.integers(0, 99), more=st.integers(0, 9))
def test_no_peak_is_lost_and_each_block_names_its_place(n: int, block: int, seed: int, more: int) -> None:
    pattern = softmax(n, seed=seed, keys=n + more)
    truth = dense(pattern)
    made = build(pattern, [0], 0, block=block)
    for row in range(made.cells.shape[1]):
        for column in range(made.cells.shape[2]):
            part = truth[row * block : (row + 1) * block, column * block : (column + 1) * block]
            cell = made.cells[0, row, column]
            assert (cell == 0) == bool(np.isnan(part).all())
            if cell and made.places is not None:
                at = divmod(int(made.places[0, row, column]), block)
                assert part[at] == np.nanmax(part)
                assert abs(dequantise(np.array([cell]))[0] - part[at]) <= made.error + 1e-7


def test_the_largest_weights_of_each_row_are_exact_and_in_order() -> None:
    pattern = softmax(37, heads=2)
    made = build(pattern, [1], 0, n_top=5)
    truth = dense(pattern, 1)
    for query in range(37):
        known = min(5, query + 1)
        np.testing.assert_allclose(
            made.top[0, query, :known], np.sort(truth[query, : query + 1])[::-1][:known], rtol=1e-6
        )
        assert (made.top_keys[0, query, known:] == -1).all()
    np.testing.assert_allclose(made.first[0], truth[:, 0], rtol=1e-6)


def test_the_mode_follows_the_length_and_the_number_of_heads() -> None:
    def mode(pattern: Any, **more: Any) -> tuple[str, int]:
        site = attention_pattern(pattern, **more).spec.facts["sites"][0]
        return site["mode"], site["block"]

    assert mode(softmax(256)) == ("exact", 1)
    assert mode(softmax(257)) == ("quantised", 1)
    assert mode(softmax(1025)) == ("image", 1)
    assert mode(softmax(4100)) == ("pyramid", 8)
    assert mode(softmax(64, heads=9)) == ("quantised", 1)
    assert mode(softmax(64), budget=600) == ("pyramid", 2)


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(ReportError, match="pass a larger budget"):
        attention_pattern(softmax(600), budget=1)


def test_signed_weights_are_shown_as_shares_and_said_to_be() -> None:
    found = family("mamba2")
    model = make(found)
    with attach(model) as wb, torch.no_grad(), wb.capture(["entropy"]) as cap:
        model(**found.inputs())
    view = attention_pattern(cap.calls[0])
    site = view.spec.facts["sites"][0]
    assert site["weights"] == "signed"
    assert "|A| / Σ|A|" in " ".join(view.spec.notes)
    truth = cap.calls[0][0].pattern.dense()[0, 0].double().abs()
    shown = dequantise(view.spec.blocks["cells:0:0"][0])
    assert np.abs(shown - (truth / truth.sum(-1, keepdim=True)).numpy()).max() <= site["error"] + 1e-6


@pytest.mark.parametrize(
    ("source", "more", "error", "said"),
    [
        (torch.full((3, 3), torch.nan), {}, ReportError, "weights run from nan"),
        (2 * torch.eye(3)[None], {}, ReportError, "weights run from 0 to 2|0 to 1"),
        (torch.eye(3), {"heads": [1]}, CaptureError, "there are 1 heads, no head 1"),
        (torch.eye(3), {"heads": []}, CaptureError, "none given"),
        (torch.eye(3), {"batch": 1}, ReportError, "entries 0 to 0, no entry 1"),
        (torch.eye(3), {"tokens": ["a"]}, ReportError, "1 tokens for 3 positions"),
        (torch.zeros(2), {}, ReportError, r"weights are \[query, key\]"),
        (torch.zeros(0, 0), {}, ReportError, "no weights to show"),
        ("text", {}, ReportError, "a str has no pattern"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_input_is_named(source: Any, more: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        attention_pattern(source, **more)


def test_of_a_batch_the_entry_is_said() -> None:
    weights = torch.rand(3, 2, 4, 4).softmax(-1)
    assert attention_pattern(weights, batch=1).spec.notes[0].startswith("Entry 1 of a batch of 3")
    assert not any("batch" in note for note in attention_pattern(weights[:1]).spec.notes)


def test_one_token_and_one_head_are_enough() -> None:
    view = attention_pattern(torch.ones(1, 1), tokens=["a"])
    assert view.data()["weight"].tolist() == [1.0]
    assert isinstance(view.to_png(), bytes)
    assert "<p>1 row</p>" in str(view.to_html())
    assert "Table, 1 row<" in view._repr_mimebundle_()["text/html"]


def test_a_live_tile_is_the_pattern_itself() -> None:
    pattern = softmax(5000)
    view = attention_pattern(pattern)
    shape, buffers = view.answer({"ask": "tile", "site": 0, "head": 0, "rows": [4000, 4100], "columns": [3950, 4050]})
    tile = np.frombuffer(buffers[0], np.float32).reshape(shape["shape"])
    truth = pattern.tile(slice(4000, 4100), slice(3950, 4050))[0, 0].numpy()
    seen = ~np.isnan(tile)
    np.testing.assert_array_equal(seen, np.arange(3950, 4050)[None] <= np.arange(4000, 4100)[:, None])
    np.testing.assert_allclose(tile[seen], truth[seen], rtol=1e-6)
    for rows in ([0, 600], [-1, 5], [4990, 5001]):
        with pytest.raises(ReportError, match="there is no tile"):
            view.answer({"ask": "tile", "site": 0, "head": 0, "rows": rows, "columns": [0, 5]})
    with pytest.raises(ReportError, match="cannot answer 'cake'"):
        view.answer({"ask": "cake"})


def test_an_empty_capture_is_refused() -> None:
    found = capture()
    empty = type(found)([], found.model_sites, found.provenance)
    for build_view in (overview, head_atlas, attention_pattern):
        with pytest.raises(ReportError, match="the capture is empty"):
            build_view(empty)


def test_atlas_values_are_means_over_queries() -> None:
    found = capture(batch=2)
    table = head_atlas(found).data()
    for row in table.itertuples():
        want = found[row.site].entropy[:, row.head].double().mean().item()
        assert row.entropy == pytest.approx(want, rel=1e-6)


def test_the_overview_of_a_capture_without_patterns_is_its_atlas() -> None:
    assert [view.spec.kind for view in overview(capture())] == ["head_atlas", "head_gallery", "attention_pattern"]
    assert [view.spec.kind for view in overview(capture().pool())] == ["head_atlas"]


def test_compared_things_must_fit() -> None:
    one, other = attention_pattern(torch.eye(3), tokens="abc"), attention_pattern(torch.eye(4), tokens="abcd")
    with pytest.raises(ReportError, match=r"shapes \[3, 3\] and \[4, 4\]"):
        compare(one, other)
    with pytest.raises(ReportError, match="the rows differ: 'c' and 'd' at 2"):
        compare(one, attention_pattern(torch.eye(3), tokens="abd"))
    with pytest.raises(ReportError, match="cannot be compared"):
        compare(one, compare(one, one))
    found = compare(torch.tensor([[1.0, 0.25]]), torch.tensor([[0.5, 0.5]])).data()
    assert found["difference"].tolist() == [0.5, -0.25]
    with pytest.raises(ReportError, match="two labels are needed"):
        compare(one, one, labels=("a",))


def opened(watched: WatchedPage, view: Any, folder: Path, address: str = "") -> Page:
    path = view.to_html(folder / "view.html")
    watched.page.goto(path.as_uri() + address)
    watched.page.wait_for_selector("html[data-ready]")
    return watched.page


def cell(page: Page, row: int, column: int, act: str = "hover") -> None:
    """Hover or click a cell of the first canvas."""
    canvas = page.locator(".matrix canvas").first
    box, data = canvas.bounding_box(), canvas.evaluate("canvas => ({ ...canvas.dataset })")
    assert box is not None
    left, top, width, height = (float(data[name]) for name in ("left", "top", "cell", "height"))
    x, y = box["x"] + left + (column + 0.5) * width, box["y"] + top + (row + 0.5) * height
    (page.mouse.move if act == "hover" else page.mouse.click)(x, y)


def said(page: Page) -> str:
    return str(page.locator(".workbench .status").inner_text())


@pytest.mark.browser
@pytest.mark.parametrize("heads", [1, 9])
def test_hover_tells_the_weight(page: WatchedPage, tmp_path: Path, heads: int) -> None:
    pattern = softmax(20, heads)
    view = attention_pattern(pattern)
    truth, site = dense(pattern), view.spec.facts["sites"][0]
    tab = opened(page, view, tmp_path)
    for row, column in ((19, 3), (7, 7), (12, 0), (15, 9)):
        cell(tab, row, column)
        text = said(tab)
        assert f"position {row} → position {column}" in text
        exact = "≈" not in text
        error = 1e-6 if exact else site["error"] + 1e-3
        shown = float(text.split("weight ")[1].replace("≈ ", ""))
        assert shown == pytest.approx(truth[row, column], rel=1e-4, abs=error)
    cell(tab, 3, 9)
    assert "not visible to this query" in said(tab)
    page.assert_clean()


@pytest.mark.browser
def test_colours_give_the_weights_back(page: WatchedPage, tmp_path: Path) -> None:
    """Square-root scale from 0 to 1: the place of a pixel's colour on the scale, squared, is the weight."""
    pattern = softmax(12)
    truth = dense(pattern)
    tab = opened(page, attention_pattern(pattern), tmp_path)
    tab.get_by_label("Colours run").select_option("one")
    read = """([row, column]) => {
      const canvas = document.querySelector('.matrix canvas'), { left, top, cell, height } = canvas.dataset;
      const dpr = window.devicePixelRatio;
      const at = (edge, i, size) => Math.round((Number(edge) + (i + 0.5) * Number(size)) * dpr);
      const pixel = canvas.getContext('2d').getImageData(at(left, column, cell), at(top, row, height), 1, 1);
      return [...pixel.data].slice(0, 3);
    }"""
    scale = np.array([scales.sequential("light")(i / 255)[:3] for i in range(256)]) * 255
    for row, column in ((11, 2), (5, 5), (9, 0), (3, 1)):
        rgb = np.array(tab.evaluate(read, [row, column]))
        place = np.abs(scale - rgb).sum(1).argmin() / 255
        assert abs(place - np.sqrt(truth[row, column])) < 3 / 255
    page.assert_clean()


@pytest.mark.browser
def test_a_click_chooses_for_all_views_and_escape_lets_go(page: WatchedPage, tmp_path: Path) -> None:
    tab = opened(page, attention_pattern(softmax(9), tokens=[f"t{i}" for i in range(9)]), tmp_path)
    cell(tab, 6, 2, "click")
    assert tab.evaluate("location.hash").startswith("#L0H0,q=6,k=2")
    assert "Query “t6” (6)" in tab.locator(".row h3").inner_text()
    weights = [
        float(cells[2])
        for cells in tab.locator(".row tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
        )
    ]
    np.testing.assert_allclose(weights, np.sort(dense(softmax(9))[6, :7])[::-1], rtol=1e-4)
    tab.locator(".matrix canvas").first.press("Escape")
    assert "q=6" not in tab.evaluate("location.hash")
    page.assert_clean()


@pytest.mark.browser
def test_nodes_grow_with_the_tokens_and_not_with_the_cells(page: WatchedPage, tmp_path: Path) -> None:
    counts = []
    for n in (200, 400):
        tab = opened(page, attention_pattern(softmax(n), tokens=[f"t{i}" for i in range(n)]), tmp_path)
        counts.append(tab.evaluate("document.querySelectorAll('.workbench *').length"))
    assert counts[1] / counts[0] < 2.3
    assert counts[1] < 1500


@pytest.mark.browser
def test_every_token_is_named_where_there_is_room(page: WatchedPage, tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(40)]
    tab = opened(page, attention_pattern(softmax(40), tokens=names), tmp_path)
    with tab.expect_download() as download:
        tab.get_by_role("button", name="SVG", exact=True).click()
    drawing = ET.fromstring(Path(download.value.path()).read_bytes())
    words = ["".join(text.itertext()) for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert [name for name in names if words.count(name) < 2] == []  # down and across
    page.assert_clean()


@pytest.mark.browser
def test_ticks_are_round(page: WatchedPage, tmp_path: Path) -> None:
    weights = torch.tensor([[[0.4, 0.3, 0.3], [0.2, 0.37, 0.43], [0.1, 0.6, 0.3]]])
    tab = opened(page, attention_pattern(weights), tmp_path)
    wanted = {
        "square root": "0 0.03 0.12 0.3 0.6",
        "linear": "0 0.12 0.24 0.36 0.48 0.6",
        "logarithmic": "0.0001 0.001 0.01 0.1 0.6",
    }
    picker = tab.locator("label.field", has=tab.get_by_text("Scale", exact=True)).locator("select")
    for scale, ticks in wanted.items():
        picker.select_option(label=scale)
        assert tab.locator(".legend .ticks").first.inner_text().split() == ticks.split()
    page.assert_clean()


@pytest.mark.browser
def test_hiding_the_first_key_names_its_mass(page: WatchedPage, tmp_path: Path) -> None:
    pattern = softmax(10)
    tab = opened(page, attention_pattern(pattern), tmp_path)
    mass = float(dense(pattern)[:, 0].mean())
    box = tab.get_by_label("Hide: first key")
    assert f"{mass:.3g}" in tab.locator(".check").inner_text()
    box.check()
    assert "Hidden: first key" in tab.locator(".check").inner_text()
    assert "hidden first key holds" in tab.locator(".row .caption").inner_text()
    page.assert_clean()


@pytest.mark.browser
def test_zoom_shows_a_part_and_all_again(page: WatchedPage, tmp_path: Path) -> None:
    tab = opened(page, attention_pattern(softmax(300)), tmp_path)
    before = float(tab.locator(".matrix canvas").evaluate("canvas => canvas.dataset.cell"))
    tab.get_by_role("button", name="Zoom in").click()
    assert float(tab.locator(".matrix canvas").evaluate("canvas => canvas.dataset.cell")) > 1.5 * before
    tab.get_by_role("button", name="Show everything").click()
    assert float(tab.locator(".matrix canvas").evaluate("canvas => canvas.dataset.cell")) == before
    page.assert_clean()


@pytest.mark.browser
def test_several_heads_stand_side_by_side(page: WatchedPage, tmp_path: Path) -> None:
    view = attention_pattern(softmax(12, heads=4), selection=SharedSelection())
    tab = opened(page, view, tmp_path, "#L0H1+3")
    assert tab.locator(".panel figcaption").all_inner_texts() == ["Head 1", "Head 3"]
    assert tab.locator(".panel .axes").all_inner_texts() == ["queries ↓, keys →"] * 2
    spec = json.loads(tab.evaluate("document.getElementById('view-0').textContent"))
    assert spec["facts"]["sites"][0]["heads"] == [0, 1, 2, 3]
    page.assert_clean()


def downloaded(tab: Page, name: str) -> list[list[str]]:
    with tab.expect_download() as download:
        tab.get_by_role("button", name=name).click()
    text = Path(download.value.path()).read_text(encoding="utf-8-sig")
    return list(csv.reader(io.StringIO(text)))


@pytest.mark.browser
def test_the_chosen_row_and_the_whole_map_are_files(page: WatchedPage, tmp_path: Path) -> None:
    weights = torch.randn(3, 7, 9, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    tokens = ["=1+1", ' "quoted", two', *(f" t{i}" for i in range(7))]
    view = attention_pattern(weights, tokens=tokens[:7], key_tokens=tokens)
    page.open(Path(view.to_html(tmp_path / "pattern.html"))).wait_for_selector("html[data-ready]")
    tab = page.page
    tab.locator("label.field", has=tab.get_by_text("Head", exact=True)).locator("select").select_option("2")
    tab.evaluate("location.hash = '#q=3'")
    tab.wait_for_function("() => document.querySelector('.attention_pattern .row h3')?.innerText.includes('(3)')")
    header, *rows = downloaded(tab, "Row CSV")
    assert header == ["key", "token", "weight", "exact"]
    assert [row[0] for row in rows] == [str(i) for i in range(9)]
    assert rows[0][1] == "'=1+1"  # no formula
    assert torch.allclose(torch.tensor([float(row[2]) for row in rows]), weights[2, 3], atol=1e-6)
    assert {row[3] for row in rows} == {"yes"}
    header, *rows = downloaded(tab, "Map CSV")
    assert header[0] == "query by key: weight"
    assert len(header) == 10
    found = torch.tensor([[float(value) for value in row[1:]] for row in rows])
    assert torch.allclose(found, weights[2], atol=1e-6)
    page.assert_clean()


@pytest.mark.browser
def test_files_of_a_pooled_map_say_what_its_cells_are(page: WatchedPage, tmp_path: Path) -> None:
    weights = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(1)).softmax(-1)
    view = attention_pattern(weights, budget=80, n_top=0)
    page.open(Path(view.to_html(tmp_path / "pattern.html"))).wait_for_selector("html[data-ready]")
    block = view.spec.facts["sites"][0]["block"]
    assert block > 1
    header, *rows = downloaded(page.page, "Map CSV")
    assert header[0] == f"query by key: largest weight in {block} x {block} tokens"
    pooled = torch.nn.functional.max_pool2d(weights[:1], block, ceil_mode=True)[0]
    found = torch.tensor([[float(value) for value in row[1:]] for row in rows])
    assert found.shape == pooled.shape
    assert torch.allclose(found, pooled, atol=0.005)
    assert {row[3] if len(row) > 3 else row[2] for row in downloaded(page.page, "Row CSV")[1:]} == {"no"}
    page.assert_clean()


@pytest.mark.browser
def test_a_table_says_what_it_leaves_out(page: WatchedPage, tmp_path: Path) -> None:
    view = attention_pattern(torch.randn(4, 40, 40).softmax(-1))
    every = 4 * 40 * 8
    assert len(view.data()) + view.spec.left_out == every > len(view.data())
    assert f"of {every:,} rows" in view._repr_mimebundle_()["text/html"]
    assert f"the first of {every:,}" in str(view)
    path = Report("Pattern").add(view).write(tmp_path / "report.html")
    tab = page.open(path)
    tab.wait_for_selector("html[data-ready]")
    said = f"{view.spec.left_out:,}"
    assert f"{said} more are left out" in tab.locator(".data > summary").inner_text()
    assert f"leaves out {said}." in tab.locator("body").inner_text()
    page.assert_clean()


FAKE_KERNEL = """
const told = {};
const values = { spec: SPEC, selection: {}, still: [], live: true, state: {} };
const model = {
  get: (name) => values[name], set() {}, save_changes() {}, off() {}, on: (name, call) => (told[name] = call),
  send: async (question) => {
    const { shape, numbers } = await answer(question);
    told["msg:custom"]({ number: question.number, shape }, [new DataView(Float32Array.from(numbers).buffer)]);
  },
};
render({ model, el: document.body });
"""


@pytest.mark.browser
def test_with_a_kernel_files_are_exact_also_of_a_pooled_map(page: WatchedPage) -> None:
    pattern = softmax(530)
    view = attention_pattern(pattern, budget=20_000)
    assert view.spec.facts["sites"][0]["block"] > 1

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        said, (buffer,) = view.answer(question)
        return {**said, "numbers": np.nan_to_num(np.frombuffer(buffer, np.float32), nan=-1).tolist()}

    tab = page.page
    tab.expose_function("answer", answer)
    tab.set_content("<!doctype html><html lang=en><title>live</title><body></body>")
    code = view.widget._esm.replace("export default", "const { render } =")
    spec = json.dumps(view.spec.to_static()).replace("<", "\\u003c")
    tab.add_script_tag(content=f"(() => {{ {code}\n{FAKE_KERNEL.replace('SPEC', spec, 1)} }})();")
    tab.locator(".workbench .matrix canvas").wait_for()
    want = np.nan_to_num(dense(pattern), nan=-1)
    header, *rows = downloaded(tab, "Map CSV")
    assert header[0] == "query by key: weight"
    found = np.array([[float(value) for value in row[1:]] for row in rows])
    assert found.shape == (530, 530)
    seen = found >= 0  # what a query does not see is -1 from this kernel
    assert np.array_equal(seen, np.tri(530, dtype=bool))
    assert np.allclose(found[seen], want[seen], atol=1e-6)
    rows = downloaded(tab, "Row CSV")[1:]
    assert {row[-1] for row in rows} == {"yes"}
    assert np.allclose([float(row[-2]) for row in rows], found[-1], atol=1e-7)
    page.assert_clean()
