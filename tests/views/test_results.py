"""Results of analyses show their own numbers, and survive a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import workbench
from support.browser import WatchedPage
from support.every_view import capture, image_capture
from support.tiny import family, make
from workbench.analysis.importance import HeadImportance, PruningCurve
from workbench.capture.capture import Capture
from workbench.capture.site_capture import Forward, SiteCapture
from workbench.hooks.sites import Site, Sites
from workbench.report import check
from workbench.storage.result import Result
from workbench.views import View, all_of, of
from workbench.views.results.profile import _uniform


def shown(result: Result, folder: Path) -> None:
    """Its page is sound, its picture is one, and what a file brings back looks the same."""
    page = Path(result.to_html(folder / "result.html"))
    assert check(page) == []
    assert set(result._repr_mimebundle_()) == {"text/html", "image/png", "text/plain"}
    again = type(result).load(result.save(folder / "result.safetensors"))
    assert [view.spec.digest for view in all_of(again)] == [view.spec.digest for view in all_of(result)]


def importance(scores: dict[tuple[str, str], torch.Tensor], **changes: Any) -> HeadImportance:
    """Of three heads."""
    held = {
        "heads": ("L0H0", "L0H1", "L1H0"),
        "sites": ("blocks.0.attn", "blocks.0.attn", "blocks.1.attn"),
        "layers": (0, 0, 1),
        "numbers": (0, 1, 0),
        "kinds": ("self",) * 3,
        "methods": tuple(dict.fromkeys(method for method, _ in scores)),
        "measures": ("loss",),
        "scores": scores,
        "clean": {"loss": torch.zeros(3)},
        "skipped": {},
        "higher_is_better": {"loss": False},
        "normalised": False,
        "grid": None,
        "seed": 0,
        "level": 0.95,
        "mode": "full",
        "provenance": {},
    }
    return HeadImportance(**held | changes)


def titles(views: list[View]) -> list[str]:
    return [view.spec.title for view in views]


def test_head_importance_is_an_atlas_with_intervals(tmp_path: Path) -> None:
    scores = torch.tensor([[1.0, 1.2, 0.8], [-0.5, -0.4, -0.6], [0.0, 0.1, -0.1]], dtype=torch.float64)
    found = importance({("zero", "loss"): scores})
    spec = of(found).spec
    np.testing.assert_allclose(spec.blocks["values"], [[1.0, -0.5, 0.0]], atol=1e-6)
    assert spec.facts["metrics"][0] == {"label": "zero", "unit": "", "meaning": "", "signed": True, "interval": True}
    assert (spec.blocks["low"] <= spec.blocks["high"]).all()
    assert "over 3 examples" in spec.caption
    shown(found, tmp_path)


def test_parts_of_heads_stand_beside_the_whole(tmp_path: Path) -> None:
    whole = torch.tensor([[1.0, 1.2, 0.8], [-0.5, -0.4, -0.6], [2.0, 2.1, 1.9]], dtype=torch.float64)
    found = importance({("zero", "loss"): whole, ("cls rows", "loss"): whole / 4, ("gradient", "loss"): -whole})
    views = all_of(found)
    assert titles(views) == ["Head importance", "Parts of heads", "How methods agree"]
    parts = views[1].data()
    assert list(dict.fromkeys(parts["method"])) == ["zero", "cls rows"]
    bars = views[1].spec.facts["figure"]["data"]
    assert [bar["name"] for bar in bars] == ["whole head", "cls rows"]
    assert bars[0]["x"] == ["L1H0", "L0H0", "L0H1"]
    assert views[2].spec.facts["figure"]["data"][0]["texttemplate"] == "%{z:.2f}"  # each cell says its number
    ranks = views[2].data().set_index(["x", "y"])["correlation"]
    assert ranks["gradient", "zero"] == pytest.approx(-1)
    assert ranks["cls rows", "zero"] == pytest.approx(1)
    shown(found, tmp_path)
    assert titles(all_of(importance({("zero", "loss"): whole}))) == ["Head importance"]


def test_an_attention_profile_is_strength_trend_offsets_and_indicators(tmp_path: Path) -> None:
    cap, _ = image_capture()
    profile = workbench.attention_profile(cap)
    views = all_of(profile)
    assert titles(views) == [
        "How far heads look",
        "Trend over layers",
        "Where heads look, relative to the query",
        "Indicators of heads",
    ]
    table = views[0].data().set_index("label")
    np.testing.assert_allclose(table["mass_1"], profile.mass[:, 1])
    blocks = views[0].spec.blocks
    z = next(block for block in blocks.values() if block.shape == (len(profile.labels) + 1, len(profile.bins)))
    np.testing.assert_allclose(z[-1], [1 / 9, 40 / 81, 32 / 81])  # 9 pairs of 81 at no hop, 40 at one, 32 at two
    assert z[-1].sum() == pytest.approx(1)
    np.testing.assert_allclose(views[2].spec.blocks["maps"], profile.offsets, atol=1e-7)
    assert views[2].spec.facts["axes"]["row0"] == -2
    assert "local focus 0, itself" in views[3].data()
    shown(profile, tmp_path)


def test_the_row_of_uniform_attention_is_its_profile_on_any_grid() -> None:
    site = Site("attn", 0, "self", 1, 1, 4)
    even = torch.full((1, 1, 12, 12), 1 / 12, dtype=torch.float64)
    held = SiteCapture(site, tuple(even.shape), {}, "none", weights=even)
    cap = Capture([Forward(0, {"attn": held})], Sites([site]), {})
    profile = workbench.attention_profile(cap, (3, 4))
    np.testing.assert_allclose(_uniform(profile), profile.mass[0])


def test_a_profile_of_text_has_a_map_of_one_row(tmp_path: Path) -> None:
    profile = workbench.attention_profile(capture())
    views = all_of(profile)
    assert views[2].spec.blocks["maps"].shape == (6, 1, 12)  # the model is causal: no key after the query
    assert views[2].spec.facts["axes"]["column0"] == -11
    assert "the first token" in views[0].spec.caption
    shown(profile, tmp_path)


def test_heads_of_two_towers_are_chosen_with_their_site(tmp_path: Path) -> None:
    found = family("t5")
    with workbench.attach(make(found)) as wb, torch.no_grad(), wb.capture() as cap:
        wb.model(**found.inputs())
    profile = workbench.attention_profile(cap)
    strength, trend, offsets, _ = all_of(profile)
    assert "EncDecAttention" in strength.spec.notes[0]
    chosen = strength.spec.facts["figure"]["data"][0]["customdata"]
    assert sorted(row[0][2] for row in chosen) == sorted(profile.sites)
    assert trend.spec.facts["figure"]["data"][0]["meta"] == {"select": ["layer", "heads", "site"]}
    assert [group["label"] for group in offsets.spec.facts["groups"]] == list(dict.fromkeys(profile.sites))
    assert offsets.spec.blocks["maps"].shape[-1] > profile.grid[1]  # the encoder looks ahead
    shown(profile, tmp_path)


def test_a_pattern_atlas_is_a_map_clusters_and_evidence(tmp_path: Path) -> None:
    cap, _ = image_capture()
    atlas = workbench.pattern_atlas(cap, 2, size=8, epochs=2, progress=False)
    views = all_of(atlas)
    assert titles(views) == ["Map of patterns", "Clusters of patterns", "Evidence for names"]
    traces = views[0].spec.facts["figure"]["data"]
    assert len(traces) == 2 * atlas.n_clusters
    heads = [trace for trace in traces if trace["name"][0].isdigit()]
    assert sum(len(trace["text"]) for trace in heads) == len(atlas.labels)
    gallery = views[1].spec
    np.testing.assert_allclose(gallery.blocks["maps"], atlas.patterns)
    np.testing.assert_allclose(gallery.blocks["means"], atlas.cluster_patterns)
    members = [tuple(atlas.labels[i] for i in group["members"]) for group in gallery.facts["groups"]]
    assert members == [atlas.members(c) for c in range(atlas.n_clusters)]
    np.testing.assert_allclose(views[2].data()["content dependence"], atlas.content_dependence, rtol=1e-6)
    shown(atlas, tmp_path)


@pytest.mark.browser
def test_a_head_chosen_in_one_view_of_a_result_is_chosen_in_all(page: WatchedPage, tmp_path: Path) -> None:
    profile = workbench.attention_profile(image_capture()[0])
    tab = page.open(Path(profile.to_html(tmp_path / "profile.html")))
    tab.wait_for_selector("html[data-ready]")
    tab.get_by_role("button", name="L1H0").first.click()
    assert tab.evaluate("location.hash").endswith("L1H0")
    assert tab.locator(".head_atlas .ranking button[aria-pressed=true] b").inner_text() == "L1H0"
    assert "head L1H0" in tab.locator(".figure .status").first.inner_text()
    tab.locator(".head_atlas .ranking button", has_text="L0H1").click()
    assert tab.locator(".head_gallery .detail h3").inner_text() == "L0H1"
    page.assert_clean()


def test_a_pruning_curve_is_lines_against_the_number_of_heads(tmp_path: Path) -> None:
    values = torch.tensor([[[0.1, 0.3]], [[0.5, 0.7]]], dtype=torch.float64)  # [count, measure, example]
    curve = PruningCurve(
        counts=(0, 2),
        n_heads=4,
        orders={"zero": ("L0H0", "L0H1"), "random 1": ("L0H1", "L0H0")},
        measures=("loss",),
        higher_is_better={"loss": False},
        values={"zero": values, "random 1": values + 1},
        seconds=torch.tensor([[2.0], [1.0]]),
        seconds_full=torch.tensor([[2.0], [2.0]]),
        parameters=torch.tensor([100.0, 80.0]),
        largest_difference=0.0,
        reason="",
        provenance={},
    )
    view = of(curve)
    table = view.data()
    assert table.loc[table["order"] == "zero", "value"].tolist() == pytest.approx([0.2, 0.6])
    assert "2 heads pruned the model runs 2.00 times as fast" in view.spec.caption
    shown(curve, tmp_path)


def test_capacity_is_an_atlas_of_what_heads_hold(tmp_path: Path) -> None:
    found = family("gpt2")
    model = make(found)
    with workbench.attach(model) as wb:
        capacity = workbench.capacity(wb, [found.inputs()], repeats=3, progress=False)
    view = of(capacity)
    table = view.data()
    rule, query = capacity.rules[0], capacity.queries[0]
    np.testing.assert_allclose(table[f"n* of {rule}, {query}"], capacity.n_star[:, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(table["load"], capacity.effective_keys, rtol=1e-6)
    shown(capacity, tmp_path)


def test_conditioning_is_bars_of_effects(tmp_path: Path) -> None:
    found = workbench.conditioning(
        experiments=["blocking", "acquisition"], rules=("hebb", "delta"), repeats=8, progress=False
    )
    view = of(found)
    table = view.data()
    blocking = table[table["experiment"] == "blocking"].set_index("subject")
    assert blocking.loc["delta", "effect"] == 1
    assert blocking.loc["hebb", "effect"] == 0
    shown(found, tmp_path)
