"""The atlas shows each head where it is, with the numbers that it was given or that the capture holds."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from playwright.sync_api import Page

from support.browser import WatchedPage
from support.every_view import capture
from support.tiny import family, make
from workbench import attach
from workbench.capture.capture import Capture
from workbench.errors import ReportError
from workbench.views import head_atlas, of


def captured(name: str, n_calls: int = 1) -> Capture:
    found = family(name)
    model = make(found)
    with attach(model) as wb, torch.no_grad(), wb.capture(["entropy", "sink", "distance"]) as cap:
        for _ in range(n_calls):
            model(**found.inputs())
    return cap


def test_towers_and_kinds_have_maps_of_their_own() -> None:
    facts = head_atlas(captured("t5")).spec.facts
    assert [group["label"] for group in facts["groups"]] == [
        "Encoder self-attention",
        "Decoder self-attention",
        "Cross-attention",
    ]
    starts = [site["start"] for group in facts["groups"] for site in group["sites"]]
    assert starts == sorted(starts)


def test_a_statistic_that_a_site_lacks_is_not_known_there() -> None:
    view = head_atlas(captured("t5"))
    table = view.data()
    cross = table["site"].str.contains("EncDecAttention")
    assert table.loc[cross, "distance"].isna().all()
    assert table.loc[~cross, "distance"].notna().all()
    assert "distance" in view.spec.notes[0]


def test_several_forwards_and_batches_are_averaged() -> None:
    cap = captured("gpt2", n_calls=3)
    view = head_atlas(cap)
    entries = 3 * cap.calls[0][0].shape[0]
    assert f"{entries} sequences" in view.spec.caption
    for row in view.data().itertuples():
        each = torch.cat([call[row.site].entropy[:, row.head] for call in cap.calls]).double().mean(-1)
        assert row.entropy == pytest.approx(each.mean().item(), rel=1e-6)


def test_a_mean_is_over_the_queries_that_can_have_it_and_says_so() -> None:
    """Induction: of tokens with an earlier copy. The first token has none before it."""
    found = family("gpt2")
    ids = torch.tensor([[5, 6, 7, 5, 6, 8, 9]])
    with attach(make(found)) as wb, torch.no_grad(), wb.capture(["induction", "previous", "entropy"]) as cap:
        wb.model(ids)
    pattern = cap[0].pattern.dense().double()[0]
    view = head_atlas(cap)
    rows = view.data().groupby("layer").get_group(0)
    assert rows["induction"].to_numpy() == pytest.approx(((pattern[:, 3, 1] + pattern[:, 4, 2]) / 2).numpy(), rel=1e-5)
    before = torch.stack([pattern[:, i, i - 1] for i in range(1, 7)]).mean(0)
    assert rows["previous"].to_numpy() == pytest.approx(before.numpy(), rel=1e-5)
    meanings = {each["label"]: each["meaning"] for each in view.spec.facts["metrics"]}
    assert "over 2 of 7 queries" in meanings["Induction"]
    assert "over 6 of 7 queries" in meanings["Previous token"]
    assert "queries" not in meanings["Entropy"]
    table = cap.table("induction")
    assert (table["n"] == 2).all()
    assert table.loc[table["layer"] == 0, "induction"].to_numpy() == pytest.approx(rows["induction"].to_numpy())


def test_five_entries_make_an_interval() -> None:
    view = head_atlas(capture(batch=5))
    assert view.spec.facts["metrics"][0]["interval"]
    low, value, high = (view.spec.blocks[name] for name in ("low", "values", "high"))
    assert (low <= value + 1e-6).all()
    assert (value <= high + 1e-6).all()
    cap = capture(batch=5)
    each = torch.cat([call[0].entropy for call in cap.calls]).double().mean(-1)[:, 0]  # of the first head
    assert float(high[0, 0] - low[0, 0]) == pytest.approx(2 * 2.776 * float(each.std()) / 5**0.5, rel=1e-3)
    assert not head_atlas(capture(batch=4)).spec.facts["metrics"][0]["interval"]


def test_scores_come_as_pairs_an_array_or_a_frame() -> None:
    array = np.arange(6.0).reshape(2, 3) - 2
    pairs = {(layer, head): array[layer, head] for layer in range(2) for head in range(3)}
    layers, heads = np.indices(array.shape)
    frame = pd.DataFrame({"layer": layers.ravel(), "head": heads.ravel(), "value": array.ravel()})
    digests = {head_atlas({"score": scores}).spec.digest for scores in (array, torch.tensor(array), pairs, frame)}
    assert len(digests) == 1
    spec = head_atlas({"score": array}).spec
    assert spec.facts["metrics"][0]["signed"]
    np.testing.assert_array_equal(spec.blocks["values"], array.reshape(1, 6))


def test_heads_without_a_score_are_not_known() -> None:
    view = head_atlas({"score": {(0, 0): 1.0, (0, 2): 2.0}})
    assert np.isnan(view.spec.blocks["values"][0, 1])
    assert "Not known for every head" in view.spec.notes[0]


@pytest.mark.parametrize(
    ("source", "more", "said"),
    [
        ({}, {}, "no head to show"),
        ({"a": {}}, {}, "no head to show"),
        ({"a": np.zeros(3)}, {}, r"are \[layer, head\]"),
        ({"a": pd.DataFrame({"layer": [0], "value": [1.0]})}, {}, "no column 'head'"),
        ({"a": np.zeros((1, 1))}, {"metric": "entropi"}, 'no metric "entropi"'),
    ],
)
def test_bad_input_is_named(source: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ReportError, match=said):
        head_atlas(source, **more)
    with pytest.raises(ReportError, match="no view shows a dict"):
        of(source)


def opened(watched: WatchedPage, view: Any, folder: Path) -> Page:
    watched.page.goto(view.to_html(folder / "atlas.html").as_uri())
    watched.page.wait_for_selector("html[data-ready]")
    return watched.page


def place(page: Page, row: int, column: int) -> dict[str, float]:
    data = page.locator("canvas").first.evaluate("canvas => ({ ...canvas.dataset })")
    left, top, width, height = (float(data[name]) for name in ("left", "top", "width", "height"))
    return {"x": left + (column + 0.5) * width, "y": top + (row + 0.5) * height}


@pytest.mark.browser
def test_clicks_choose_shift_adds_and_a_drag_takes_several(page: WatchedPage, tmp_path: Path) -> None:
    tab = opened(page, head_atlas({"score": np.random.default_rng(0).random((4, 6))}), tmp_path)
    canvas = tab.locator("canvas").first
    canvas.click(position=place(tab, 2, 3))
    assert tab.evaluate("location.hash") == "#L2H3"
    canvas.click(position=place(tab, 2, 1), modifiers=["Shift"])
    assert tab.evaluate("location.hash") == "#L2H3+1"
    canvas.click(position=place(tab, 2, 3), modifiers=["Shift"])
    assert tab.evaluate("location.hash") == "#L2H1"
    box = canvas.bounding_box()
    assert box is not None
    for act, column in (("move", 1), ("down", 1), ("move", 4), ("up", 4)):
        at = place(tab, 3, column)
        tab.mouse.move(box["x"] + at["x"], box["y"] + at["y"])
        if act != "move":
            getattr(tab.mouse, act)()
    assert tab.evaluate("location.hash") == "#L3H1+2+3+4"
    canvas.press("Escape")
    assert tab.evaluate("location.hash") == ""
    page.assert_clean()


@pytest.mark.browser
def test_hover_says_the_value_and_its_interval(page: WatchedPage, tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"layer": [0, 0, 0], "head": [0, 1, 2], "value": [0.5, -0.25, 0.1], "low": [0.4, -0.5, np.nan],
         "high": [0.7, 0.1, np.nan]}
    )  # fmt: skip
    view = head_atlas({"effect": frame}, unit="nats")
    assert "No interval of 1 head by effect" in view.spec.notes[0]
    tab = opened(page, view, tmp_path)
    canvas = tab.locator("canvas").first
    canvas.hover(position=place(tab, 0, 1))
    assert "L0H1: effect -0.25 nats, interval -0.5 to 0.1" in tab.locator(".status").inner_text()
    canvas.hover(position=place(tab, 0, 2))
    assert "L0H2: effect 0.1 nats, no interval" in tab.locator(".status").inner_text()
    tab.get_by_label("Hide heads whose interval crosses 0").check()
    assert tab.locator(".ranking li").count() == 1
    page.assert_clean()


@pytest.mark.browser
def test_a_cell_says_what_the_ranking_says(page: WatchedPage, tmp_path: Path) -> None:
    tab = opened(page, head_atlas({"score": np.array([[0.149, 12.34], [0.0, -0.0123]])}), tmp_path)
    with tab.expect_download() as download:
        tab.get_by_role("button", name="SVG", exact=True).click()
    words = ET.fromstring(Path(download.value.path()).read_bytes()).itertext()
    assert {".149", "12.3", "0", "−.0123"} <= set(words)
    assert tab.locator(".ranking .n").all_inner_texts() == ["12.3", "0.149", "−0.0123", "0"]
    page.assert_clean()


@pytest.mark.browser
def test_the_ranking_says_how_many_heads_it_lists_and_grows(page: WatchedPage, tmp_path: Path) -> None:
    tab = opened(page, head_atlas({"score": np.random.default_rng(0).random((6, 8))}), tmp_path)
    assert tab.locator(".ranking li").count() == 40
    assert tab.get_by_text("40 of 48 heads").is_visible()
    tab.get_by_role("button", name="Show more").click()
    assert tab.locator(".ranking li").count() == 48
    assert tab.get_by_text("all 48 heads").is_visible()
    page.assert_clean()


@pytest.mark.browser
def test_large_grids_fit_and_small_ones_are_legible(page: WatchedPage, tmp_path: Path) -> None:
    for shape in ((48, 64), (1, 1), (2, 128)):
        tab = opened(page, head_atlas({"score": np.random.default_rng(0).random(shape)}), tmp_path)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 1280
        cell = place(tab, 0, 0)
        assert cell["x"] > 30
    page.assert_clean()
