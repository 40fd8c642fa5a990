"""Capacity curves, the map of heads, correlations with importance and conditioning curves: numbers and pages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page

import workbench
from support.browser import WatchedPage
from support.every_view import VIEWS, capacity
from workbench import views
from workbench.analysis.conditioning import theory
from workbench.errors import CaptureError, ReportError
from workbench.views.head_atlas import HeadAtlas


def test_the_spec_holds_the_numbers_of_the_result() -> None:
    found = capacity()
    spec = views.capacity_curves(found, layer=1, head=2).spec
    assert spec.facts["heads"][spec.facts["first"]]["label"] == "L1H2"
    np.testing.assert_allclose(spec.blocks["curves"], found.curves, rtol=1e-6)
    np.testing.assert_allclose(spec.blocks["knees"][..., 0], found.n_star, rtol=1e-6)
    np.testing.assert_array_equal(spec.blocks["knees"][..., 3] > 0, found.censored)
    n = found.sizes[-1]
    wanted = 10 * np.log10(theory.snr(n, 8))
    assert spec.blocks["theory"][0, 0, -1] == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(spec.blocks["about"][:, 2], found.overlap * found.d_k, rtol=1e-5)
    assert spec.notes == found.limits


def test_it_begins_with_the_head_of_median_capacity() -> None:
    found = capacity()
    first = views.capacity_curves(found).spec.facts["first"]
    held = found.n_star[:, 0, 0]
    assert (held <= held[first]).sum() >= len(held) / 2
    assert (held >= held[first]).sum() >= len(held) / 2


def test_a_head_that_is_not_there_is_refused() -> None:
    with pytest.raises(CaptureError, match="no head"):
        views.capacity_curves(capacity(), layer=7, head=0)
    with pytest.raises(ReportError, match="no heads"):
        views.capacity_curves(replace(capacity(), heads=()))


def test_the_map_has_head_room_overlap_and_importance() -> None:
    found = capacity()
    view = views.of(found)
    assert isinstance(view, HeadAtlas)
    table = view.data()
    np.testing.assert_allclose(table["head-room of hebb, stored"], found.headroom[:, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(table["overlap of the keys over that of random ones"], found.excess, rtol=1e-5)
    assert table["importance"].isna().sum() == 2
    signed = {metric["label"]: metric["signed"] for metric in view.spec.facts["metrics"]}
    assert not signed["load"]


def test_the_correlation_is_points_with_intervals() -> None:
    found = capacity()
    view = views.capacity_correlation(found)
    table = view.data().set_index("quantity")
    assert table.loc["load", "rho"] == pytest.approx(found.correlation["load"][0])
    assert (table["low"] <= table["high"]).all()
    assert "over 4 heads" in view.spec.caption
    assert view.to_png()[:4] == b"\x89PNG"  # type: ignore[index]
    with pytest.raises(ReportError, match="no importance"):
        views.capacity_correlation(replace(found, correlation={}, importance=None))


def test_conditioning_bars_say_what_leaves_the_chart() -> None:
    found = workbench.conditioning(
        experiments=["acquisition", "latent_inhibition"], rules=("hebb", "delta"), repeats=4, d=16,
        progress=False,
    )  # fmt: skip
    notes = " ".join(views.of(found).spec.notes)
    assert "Bars of hebb leave the chart" in notes
    assert "silent about latent inhibition" in notes


def test_conditioning_curves_have_a_row_per_trial() -> None:
    table = VIEWS["conditioning_curves"]().data()
    blocking = table[(table["experiment"] == "blocking") & (table["subject"] == "delta")]
    assert blocking["after"].tolist() == ["–", *["A+"] * 3, *["AB+"] * 3, "–", *["C+"] * 3, *["AB+"] * 3]
    assert blocking["trial"].tolist() == [*range(7), *range(7)]
    last = blocking[blocking["trial"] == 6].set_index("group")["expected"]
    assert last["experimental"] < last["control"]


def opened(page: WatchedPage, view: views.View, path: Path) -> Page:
    view.to_html(path)
    page.open(path).wait_for_selector("html[data-ready]")
    return page.page


@pytest.mark.browser
def test_the_selection_chooses_the_head(page: WatchedPage, tmp_path: Path) -> None:
    tab = opened(page, views.capacity_curves(capacity()), tmp_path / "curves.html")
    tab.evaluate("location.hash = '#L1H2'")
    words = tab.locator(".sums")
    words.filter(has_text="L1H2").wait_for()
    tab.get_by_label("Head").select_option(label="L0H1")
    assert words.inner_text().startswith("L0H1: d_k 8")
    assert "L0H1" in tab.url
    tab.locator("canvas").first.press("]")
    assert "L0H2" in tab.url
    tab.get_by_label("Asked with").select_option(label="noisy keys")
    assert "silent" in tab.locator(".about").inner_text()
    page.assert_clean()


@pytest.mark.browser
def test_keys_tell_the_measured_values(page: WatchedPage, tmp_path: Path) -> None:
    found = capacity()
    tab = opened(page, views.capacity_curves(found, layer=0, head=0), tmp_path / "curves.html")
    tab.get_by_label("Measure").select_option(label="cosine")
    chart = tab.locator("canvas").first
    chart.press("End")
    value = found.curve("cosine", "hebb")[0][0, -1].item()
    said = tab.locator(".status").inner_text()
    assert said.startswith(f"hebb: stored pairs n {found.sizes[-1]}, cosine ")
    assert float(said.split("cosine ")[1].split(" (")[0]) == pytest.approx(value, rel=1e-5)
    page.assert_clean()


@pytest.mark.browser
def test_experiments_are_walked_by_keys_and_say_where_theory_is_silent(page: WatchedPage, tmp_path: Path) -> None:
    tab = opened(page, VIEWS["conditioning_curves"](), tmp_path / "conditioning.html")
    assert tab.locator(".warning").is_hidden()
    tab.locator("canvas").first.press("]")
    assert tab.locator(".sums").inner_text().startswith("latent inhibition: ")
    assert "writing a value of 0" in tab.locator(".warning").inner_text()
    tab.get_by_label("hebb").uncheck()
    tab.get_by_label("delta").uncheck()
    assert tab.locator(".effects tbody tr").count() == 2
    page.assert_clean()
