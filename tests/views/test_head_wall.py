"""The wall of heads: every head's pattern of a capture, made small without losing a peak, in any order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import workbench
from support.browser import WatchedPage
from support.every_view import WORDS, capture
from workbench.analysis.circuits.roles import HeadRoles
from workbench.errors import CaptureError, ReportError, WorkbenchError
from workbench.kernels import s2
from workbench.kernels.masks import Mask, causal
from workbench.kernels.patterns import DensePattern, Pattern
from workbench.kernels.softmax import SoftmaxPattern
from workbench.views import Axes, head_gallery
from workbench.views.attention_pattern.pyramid import dequantise
from workbench.views.head_gallery import of_capture
from workbench.views.head_gallery.of_capture import pooled

ERROR = 1 / 254 + 1e-6  # half a level at the largest weight, where levels are widest


def softmax(n: int = 17, heads: int = 3, mask: Mask | None = None) -> Pattern:
    random = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(2, heads, n, 8, generator=random) for _ in range(2))
    return SoftmaxPattern(q, k, mask=causal(n, n) if mask is None else mask)


def naive(weights: torch.Tensor, block: int) -> np.ndarray:
    """The largest weight of each block of [head, query, key], by loops."""
    heads, queries, keys = weights.shape
    made = np.zeros((heads, -(-queries // block), -(-keys // block)))
    for row in range(made.shape[1]):
        for column in range(made.shape[2]):
            part = weights[:, row * block : (row + 1) * block, column * block : (column + 1) * block]
            made[:, row, column] = part.flatten(1).max(1).values.numpy()
    return made


def test_what_a_layout_of_each_head_hides_is_not_seen() -> None:
    q = k = torch.randn(1, 4, 64, 8, generator=torch.Generator().manual_seed(0))
    sharded = s2.pattern(q, k, block=16, local_blocks=1, vert_stride=4)
    maps, broken = pooled(sharded, [0, 2, 3], 0, 4)
    dense = sharded.dense()[0, [0, 2, 3]]
    want = naive((dense != 0).float(), 4)
    np.testing.assert_array_equal(maps != 0, want != 0)
    assert len({each.tobytes() for each in maps != 0}) == 3
    assert broken == [False] * 3


@pytest.mark.parametrize("block", [1, 2, 5, 17, 20])
@pytest.mark.parametrize("strip", [1, 100, 1 << 20])
def test_blocks_hold_the_largest_weight_and_what_is_hidden_is_not_seen(
    block: int, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_capture, "_STRIP_CELLS", strip)
    pattern = softmax()
    found, broken = pooled(pattern, [2, 0], 1, block)
    wanted = naive(pattern.dense()[1, [2, 0]], block)
    assert np.abs(dequantise(found) - wanted).max() < ERROR
    rows, columns = np.indices(found.shape[1:])
    assert ((found == 0) == (columns * block > np.minimum((rows + 1) * block, 17) - 1)).all()
    assert broken == [False, False]


def test_weights_that_are_no_numbers_are_grey_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.full((1, 2, 4, 4), 0.25)
    weights[0, 1, 2, 3] = torch.nan
    found, broken = pooled(DensePattern(weights), [0, 1], 0, 2)
    assert broken == [False, True]
    assert (found == 0).sum() == 1
    assert found[1, 1, 1] == 0
    monkeypatch.setattr(of_capture, "pooled", lambda *_: (np.ones((3, 12, 12), np.uint8), [False, True, False]))
    assert "which the model gave, are grey: L0H1, L1H1." in head_gallery(capture()).spec.notes[-1]


def test_a_capture_is_shown_whole_with_its_statistics_scores_and_roles() -> None:
    cap = capture()
    roles = HeadRoles(("L0H1", "L1H2"), (("induction",), ()), {}, {}, 0.3, "ioi", {})
    view = head_gallery(cap, numbers={"importance": torch.arange(6.0).view(2, 3)}, roles=roles)
    facts = view.spec.facts
    assert [head["label"] for head in facts["heads"]] == [f"L{layer}H{head}" for layer in (0, 1) for head in range(3)]
    assert facts["axes"]["row_texts"] == facts["axes"]["column_texts"] == [f"\u2423word{i}" for i in range(12)]
    assert [head["said"] for head in facts["heads"]] == ["", "induction", "", "", "", ""]
    np.testing.assert_array_equal(view.data()["importance"], np.arange(6.0))
    entropy = torch.stack([each.entropy[0].double().mean(-1) for each in cap]).flatten()
    np.testing.assert_allclose(view.data()["Entropy"], entropy, rtol=1e-6)
    wanted = torch.cat([each.pattern.dense()[0] for each in cap]).numpy()
    assert np.abs(dequantise(view.spec.blocks["maps"]) - wanted).max() < ERROR
    view.set_state(order="Entropy")
    ranked = view._groups()[0]["members"]
    assert ranked == torch.argsort(entropy, descending=True, stable=True).tolist()
    view.set_state(order="role")
    assert [(group["label"], group["members"]) for group in view._groups()] == [
        ("induction", [1]),
        ("no role", [0, 2, 3, 4, 5]),
    ]
    assert view.to_png() != head_gallery(cap).to_png()


def test_long_patterns_are_made_small_and_cells_say_which_tokens_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_capture, "LARGER", 5)
    spec = head_gallery(capture()).spec
    assert spec.blocks["maps"].shape == (6, 4, 4)
    assert spec.facts["axes"]["step"] == 3
    assert spec.facts["axes"]["row_texts"] is None
    assert "the largest weight of 3 x 3 tokens" in spec.caption


def test_what_cannot_be_shown_is_said() -> None:
    cap = capture()
    assert head_gallery(capture(batch=2), batch=1).spec.notes[1].startswith("Entry 1 of a batch of 2")
    with pytest.raises(ReportError, match="no entry 3"):
        head_gallery(cap, batch=3)
    with pytest.raises(ReportError, match="of none of the heads"):
        head_gallery(cap, numbers={"importance": {(7, 0): 1.0}})
    with pytest.raises(WorkbenchError):
        head_gallery(cap, sites=["no such site"])
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=8)
    ).eval()
    with (
        workbench.attach(model) as wb,
        torch.inference_mode(),
        wb.capture(["entropy"], queries_keys=False) as bare,
    ):
        model(torch.arange(5)[None])
    with pytest.raises(CaptureError, match="no pattern was kept"):
        head_gallery(bare)


@pytest.mark.browser
def test_every_map_of_a_large_wall_is_painted_in_turns(page: WatchedPage, tmp_path: Path) -> None:
    """Also in other colours, in another order, and at once for a print."""
    n = 300
    maps = np.random.default_rng(0).random((n, 40, 40))
    view = head_gallery(maps, [(i // 10, i % 10) for i in range(n)], axes=Axes("query", "key"), numbers={"x": range(n)})
    tab = page.open(Path(view.to_html(tmp_path / "wall.html")))
    tab.wait_for_selector("html[data-ready]")
    done = "() => !document.querySelector('.gallery').hasAttribute('aria-busy')"
    pixels = """[...document.querySelectorAll('.gallery .tile')].map((tile) => {
      const own = tile.querySelector('canvas');
      if (own) return own.toDataURL();
      const { left, top, width, height } = tile.querySelector('.place').getBoundingClientRect();
      const sheet = [...tile.parentElement.querySelectorAll('.sheet')].find((each) => {
        const place = each.getBoundingClientRect();
        return place.top <= top + 1 && top + height <= place.bottom + 1;
      });
      const { left: x, top: y } = sheet.getBoundingClientRect();
      const ink = sheet.getContext('2d');
      return [...ink.getImageData(Math.round(left - x), Math.round(top - y), width, height).data].join();
    })"""
    tab.wait_for_function(done)
    assert tab.locator(".gallery canvas").count() == n // 10  # a canvas each would be a layer each, and scroll badly
    light = tab.evaluate(pixels)
    assert len(set(light)) == len(light) == n  # none is empty, none is another one's
    tab.locator("#theme").select_option("dark")
    tab.wait_for_selector(".workbench[data-theme=dark]")
    tab.wait_for_function(done)
    dark = tab.evaluate(pixels)
    assert not set(dark) & set(light)
    tab.get_by_label("Order by").select_option("x")
    assert tab.locator("button.tile span").first.inner_text() == "L29H9\n299"
    assert tab.evaluate(pixels) == dark[::-1]
    tab.emulate_media(media="print")
    tab.wait_for_selector(".workbench[data-theme=light]")
    assert tab.locator(".gallery .tile canvas").count() == n  # which a page may break between
    assert len(set(tab.evaluate(pixels))) == n
    tab.emulate_media(media="screen")
    tab.wait_for_selector(".workbench[data-theme=dark]")
    tab.wait_for_function(done)
    assert tab.evaluate(pixels) == dark[::-1]
    page.assert_clean()


@pytest.mark.browser
def test_heads_are_ordered_and_cells_named(page: WatchedPage, tmp_path: Path) -> None:
    view = head_gallery(capture(), numbers={"importance": torch.tensor([[0.0, 5, 1], [2, 4, torch.nan]])})
    tab = page.page
    tab.goto(Path(view.to_html(tmp_path / "wall.html")).as_uri() + "#L1H0")
    tab.wait_for_selector("html[data-ready]")
    assert tab.locator(".group h3").all_inner_texts() == ["Layer 0", "Layer 1"]
    tab.get_by_label("Order by").select_option("importance")
    assert tab.locator("button.tile span").all_inner_texts() == [
        "L0H1\n5", "L1H1\n4", "L1H0\n2", "L0H2\n1", "L0H0\n0", "L1H2\n–",
    ]  # fmt: skip
    assert tab.locator(".detail h3").inner_text() == "L1H0"
    tab.locator("button.tile").first.focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".detail h3").inner_text() == "L1H1"
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash").startswith("#L1H1")
    tab.locator(".detail canvas").focus()
    tab.keyboard.press("Home")
    weight = capture()[1].pattern.dense()[0, 1, 6, 0].item()
    said = tab.locator(".status").inner_text()
    assert said.startswith(f"L1H1, query “\u2423{WORDS[6].strip()}” (6), key “\u2423word0” (0): weight ")
    assert float(said.rpartition(" ")[2]) == pytest.approx(weight, abs=ERROR)
    page.assert_clean()
