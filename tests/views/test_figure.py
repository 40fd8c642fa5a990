"""The figure host: what it takes of a figure, its pictures, and the chart in a browser, static and live."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from playwright.sync_api import Page
from plotly.offline import get_plotlyjs_version
from plotly.subplots import make_subplots

from support.browser import WatchedPage
from support.hostile import HOSTILE
from workbench.errors import ReportError
from workbench.tokens import plotly_text
from workbench.views import SharedSelection, figure
from workbench.views.base import modules
from workbench.views.base.widget import answer_of

PLAIN = {"title": "Chart", "caption": "What it shows."}


def curve() -> go.Figure:
    x = np.arange(6)
    fig = go.Figure()
    fig.add_scatter(x=x, y=1 - x / 8, mode="lines", line_width=0, hoverinfo="skip", showlegend=False)
    fig.add_scatter(x=x, y=0.8 - x / 8, mode="lines", line_width=0, fill="tonexty", hoverinfo="skip", name="interval")
    fig.add_scatter(
        x=x,
        y=0.9 - x / 8,
        name="mean",
        error_y={"array": np.full(6, 0.05)},
        meta={"select": ["layer", "heads"]},
        customdata=np.stack([x // 3, x % 3], 1),
    )
    fig.add_scatter(x=x, y=x / 10, name="zero", line_dash="dot")
    fig.add_hline(y=0.5, annotation_text="chance")
    return fig.update_layout(xaxis_title="heads kept", yaxis_title="effect")


def heat() -> go.Figure:
    z = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
    z[1, 2] = np.nan
    where = np.stack(np.meshgrid(np.arange(3), np.arange(4), indexing="ij"), -1)
    trace = go.Heatmap(z=z, customdata=where, meta={"select": ["layer", "heads"]}, colorbar_title="effect")
    return go.Figure(trace, {"yaxis": {"autorange": "reversed", "title": "layer"}, "xaxis": {"title": "head"}})


# What it takes of a figure.


def test_the_bundle_is_that_of_the_installed_plotly() -> None:
    head = modules.plotly()[:200]
    found = re.search(r"v(\d+\.\d+\.\d+)", head)
    assert found
    assert found[1] == get_plotlyjs_version(), (
        f"get package/plotly-cartesian.min.js by `npm pack plotly.js-cartesian-dist-min@{get_plotlyjs_version()}`"
    )


def test_the_bundle_cannot_end_its_script_element() -> None:
    text = modules.plotly().lower()
    assert "</script" not in text
    assert "<!--" not in text
    assert "MIT" in files("workbench.views.figure").joinpath("plotly-cartesian.LICENSE.txt").read_text()


def test_numbers_travel_as_blocks_not_as_text() -> None:
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    view = figure(go.Figure(go.Scatter(y=values)), **PLAIN, table={"n": [5000]})
    assert np.array_equal(view.spec.blocks["a0"], values)
    assert len(json.dumps(view.spec.to_static())) < 4 / 3 * values.nbytes + 2000


@pytest.mark.usefixtures("released")
def test_the_module_is_small() -> None:
    assert len(modules.live("figure").encode()) < 50_000


def test_the_table_is_made_from_the_traces() -> None:
    table = figure(curve(), **PLAIN).data()
    assert list(table.columns) == ["series", "heads kept", "effect", "error below", "error above"]
    assert list(table["series"]) == ["mean"] * 6 + ["zero"] * 6  # bands are no rows of their own
    assert np.allclose(table["effect"][:6], 0.9 - np.arange(6) / 8)
    assert np.allclose(table["error above"][:6], 0.05)
    cells = figure(heat(), **PLAIN).data()
    assert list(cells.columns) == ["head", "layer", "effect"]
    assert cells["effect"].isna().sum() == 1
    assert cells.iloc[7].tolist() == [3, 1, 2]


def test_a_given_table_is_taken() -> None:
    given = pd.DataFrame({"head": ["L0H1", None], "n": [1, 2], "effect": pd.array([0.5, None], dtype="Float64")})
    shown = figure(curve(), **PLAIN, table=given).data()
    assert shown["head"].tolist() == ["L0H1", "–"]
    assert shown["n"].tolist() == [1, 2]
    assert np.isnan(shown["effect"][1])


def test_a_long_table_is_cut_and_says_so() -> None:
    view = figure(go.Figure(go.Heatmap(z=np.zeros((101, 100)))), **PLAIN)
    assert len(view.data()) == 10_000
    assert "10,000" in view.spec.notes[0]


def test_scales_start_at_zero_or_lie_around_it() -> None:
    signed = figure(heat(), **PLAIN).spec.facts
    assert signed["scales"] == ["diverging"]
    assert signed["figure"]["data"][0]["zmin"] == -signed["figure"]["data"][0]["zmax"] == -6
    below = figure(go.Figure(go.Heatmap(z=[[-6.0, -1.0]], zmin=-6, zmax=-1)), **PLAIN).spec.facts
    assert below["scales"] == ["sequential"]  # the middle of these limits is not 0
    plain = figure(go.Figure(go.Heatmap(z=[[0.2, 0.9]])), **PLAIN).spec.facts
    assert plain["scales"] == ["sequential"]
    assert (plain["figure"]["data"][0]["zmin"], plain["figure"]["data"][0]["zmax"]) == (0, 1)


@pytest.mark.parametrize(
    ("fig", "said"),
    [
        ([1, 2], "not a plotly figure"),
        (go.Figure(), "no traces"),
        (go.Figure([go.Scatter3d(x=[1]), go.Sankey()]), "sankey, scatter3d"),
        (go.Figure(go.Scatter(y=[1]), frames=[go.Frame()]), "frames"),
        (go.Figure(go.Image(source="https://example.org/x.png")), "fetched"),
        (go.Figure(go.Scatter(y=[1, 2], meta={"select": ["layer"]})), "no customdata"),
        (go.Figure(go.Scatter(y=[1, 2], customdata=[1], meta={"select": ["layer"]})), "for 1"),
        (go.Figure(go.Scatter(y=[1], customdata=[0.5], meta={"select": ["layer"]})), "0.5"),
        (go.Figure(go.Scatter(y=[1], customdata=[1], meta={"select": ["level"]})), "level"),
        (go.Figure(go.Scatter(y=[1], customdata=[[1]], meta={"select": ["layer", "heads"]})), "fewer columns"),
    ],
)
def test_what_cannot_be_shown_is_refused(fig: Any, said: str) -> None:
    with pytest.raises(ReportError, match=said):
        figure(fig, **PLAIN)


# Clicks in Python.


def test_a_click_reaches_python() -> None:
    view = figure(curve(), **PLAIN, selection=SharedSelection())
    heard: list[Any] = []
    end = view.on_click(heard.append)
    answer_of(view, {"ask": "clicked", "trace": 2, "index": 4, "x": 4, "y": 0.4})
    (click,) = heard
    assert (click.trace, click.name, click.index, click.x) == (2, "mean", 4, 4)
    assert click.selects == {"layer": 1, "heads": [1]}
    end()
    answer_of(view, {"ask": "clicked", "trace": 2, "index": 4})
    assert len(heard) == 1
    grid = figure(heat(), **PLAIN)
    grid.on_click(heard.append)
    answer_of(grid, {"ask": "clicked", "trace": 0, "index": [2, 3]})
    assert heard[-1].selects == {"layer": 2, "heads": [3]}


@pytest.mark.parametrize("question", [{"trace": 9, "index": 0}, {"trace": 2, "index": 99}, {"trace": 2, "index": "x"}])
def test_wrong_clicks_are_refused(question: dict[str, Any]) -> None:
    with pytest.raises(ReportError):
        answer_of(figure(curve(), **PLAIN), {"ask": "clicked", **question})


# Pictures.


def _panels() -> go.Figure:
    fig = make_subplots(1, 2, subplot_titles=["bars", "boxes"])
    fig.add_bar(x=["a", "b"], y=[1, -2], error_y={"array": [0.3, 0.2]}, name="one", row=1, col=1)
    fig.add_bar(x=["a", "b"], y=[2, 1], name="two", row=1, col=1)
    fig.add_box(y=[1.0, 2, 3, 9], name="box", row=1, col=2)
    return fig


def _drawn(fig: go.Figure) -> Any:
    from matplotlib.figure import Figure

    drawn = Figure()
    figure(fig, **PLAIN).picture(drawn)
    return drawn


def test_pictures_hold_the_numbers() -> None:
    (axes,) = _drawn(curve()).axes
    lines = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 6]
    assert any(np.allclose(line, 0.9 - np.arange(6) / 8) for line in lines)
    assert axes.get_xlabel() == "heads kept"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["interval", "mean", "zero"]
    assert "chance" in [text.get_text() for text in axes.texts]


def test_a_picture_of_a_heatmap_runs_as_the_chart_does() -> None:
    axes = _drawn(heat()).axes[0]
    low, high = axes.get_ylim()
    assert low > high  # layer 0 on top
    mesh = axes.collections[0].get_array()
    assert np.ma.count_masked(mesh) == 1
    assert float(mesh[0, 0]) == -5


def test_a_picture_has_the_texts_of_cells() -> None:
    """As they are: "$" begins no formula, and entities of plotly's text are characters."""
    trace = go.Heatmap(z=[[0.1, 0.9]], text=[["$a&lt;b$", "x"]], texttemplate="%{text}")
    axes = _drawn(go.Figure(trace)).axes[0]
    assert [text.get_text() for text in axes.texts] == ["$a<b$", "x"]
    assert not any(text.get_parse_math() for text in axes.texts)


def test_a_picture_has_a_panel_per_subplot() -> None:
    bars, boxes = _drawn(_panels()).axes
    assert sorted(patch.get_height() for patch in bars.patches) == [-2, 1, 1, 2]
    assert (bars.get_title(), boxes.get_title()) == ("bars", "boxes")


def test_histograms_lying_bars_and_log_axes_are_drawn() -> None:
    values = np.arange(10.0)
    (axes,) = _drawn(go.Figure(go.Histogram(x=values, xbins={"start": 0, "end": 10, "size": 5}))).axes
    assert [patch.get_height() for patch in axes.patches] == [5, 5]
    (lying,) = _drawn(go.Figure(go.Bar(x=[1, 10], y=["a", "b"], orientation="h"), {"xaxis": {"type": "log"}})).axes
    assert [patch.get_width() for patch in lying.patches] == [1, 10]
    assert lying.get_xscale() == "log"


def test_a_picture_names_what_it_cannot_draw() -> None:
    view = figure(go.Figure(go.Violin(y=[1, 2, 3])), **PLAIN)
    with pytest.raises(ReportError, match="violin"):
        view.to_png()
    assert "violin" in str(view.to_html())


def test_every_form_of_a_figure_is_there() -> None:
    bundle = figure(curve(), **PLAIN)._repr_mimebundle_()
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "<img" in bundle["text/html"]
    assert "What it shows." in bundle["text/plain"]


# In a browser.


def _opened(watched: WatchedPage, view: Any, folder: Path) -> Page:
    view.to_html(folder / "figure.html")
    watched.open(folder / "figure.html").wait_for_selector("html[data-ready]")
    return watched.page


@pytest.mark.browser
def test_keys_walk_over_the_points_and_choose(page: WatchedPage, tmp_path: Path) -> None:
    tab = _opened(page, figure(curve(), **PLAIN), tmp_path)
    chart, status = tab.locator(".chart"), tab.locator(".status")
    chart.press("ArrowRight")
    assert status.inner_text() == "mean: heads kept 0, effect 0.9 ± 0.05"
    tab.locator(".ring:not([hidden])").wait_for()
    chart.press("End")
    assert status.inner_text() == "mean: heads kept 5, effect 0.275 ± 0.05"
    chart.press("Enter")
    assert tab.evaluate("location.hash") == "#L1H2"
    chart.press("ArrowDown")
    assert status.inner_text() == "zero: heads kept 5, effect 0.5"
    page.assert_clean()


@pytest.mark.browser
def test_a_click_on_a_cell_chooses_and_a_choice_moves_the_cursor(page: WatchedPage, tmp_path: Path) -> None:
    tab = _opened(page, figure(heat(), **PLAIN), tmp_path)
    box = tab.locator(".nsewdrag").bounding_box()
    assert box
    tab.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.1)
    tab.wait_for_function("() => location.hash === '#L0H3'")
    assert tab.locator(".status").inner_text() == "head 3, layer 0: effect -2"
    tab.evaluate("location.hash = '#L2H1'")
    tab.wait_for_function("() => document.querySelector('.status').textContent === 'head 1, layer 2: effect 4'")
    tab.locator(".chart").press("ArrowUp")
    assert tab.locator(".status").inner_text() == "head 1, layer 1: effect 0"
    page.assert_clean()


@pytest.mark.browser
def test_the_theme_reaches_the_chart(page: WatchedPage, tmp_path: Path) -> None:
    tab = _opened(page, figure(curve(), **PLAIN), tmp_path)
    for theme, ink in (("dark", "rgb(228, 232, 236)"), ("light", "rgb(28, 33, 39)")):
        tab.locator("#theme").select_option(theme)
        tab.wait_for_function(f"() => getComputedStyle(document.querySelector('.xtick text')).fill === '{ink}'")
    assert tab.locator(".main-svg").first.evaluate("svg => getComputedStyle(svg).backgroundColor") == "rgba(0, 0, 0, 0)"
    assert tab.locator("[data-title^='Share'], .plotlyjsicon").count() == 0
    tab.set_viewport_size({"width": 700, "height": 800})
    tab.wait_for_function("() => document.querySelector('.main-svg').clientWidth <= 700")
    page.assert_clean()


@pytest.mark.browser
def test_hostile_tokens_are_text(page: WatchedPage, tmp_path: Path) -> None:
    shown = [plotly_text(token) for token in HOSTILE]
    fig = go.Figure(go.Bar(y=shown, x=list(range(len(shown))), text=shown, orientation="h"), {"height": 1200})
    fig.update_yaxes(type="category", tickmode="linear", dtick=1)
    tab = _opened(page, figure(fig, **PLAIN), tmp_path)
    ticks = tab.locator(".ytick text").evaluate_all("texts => texts.map(text => text.textContent)")
    assert [tick.strip() for tick in ticks] == list(HOSTILE.values())
    assert tab.locator(".ytick a, .ytick tspan[style*='bold']").count() == 0
    assert tab.evaluate("window.__pwn === undefined")
    page.assert_clean()


LIVE = """
globalThis.define = Object.assign(() => { throw new Error("an AMD loader took it"); }, { amd: {} });
const bytes = Uint8Array.from(atob(BUNDLE), (c) => c.charCodeAt(0));
globalThis.asked = [];
function fake() {
  const told = {};
  const values = { spec: SPEC(), selection: {}, still: [], live: true };
  return {
    get: (name) => values[name],
    set: (name, value) => (values[name] = value),
    save_changes() {},
    on: (name, call) => (told[name] = call),
    off() {},
    send: (question) => {
      asked.push(question);
      const buffers = question.ask === "plotly" ? [new DataView(bytes.buffer)] : [];
      queueMicrotask(() => told["msg:custom"]({ number: question.number }, buffers));
    },
  };
}
for (let i = 0; i < 2; i++) render({ model: fake(), el: document.body.appendChild(document.createElement("div")) });
"""


@pytest.mark.browser
def test_live_charts_ask_once_for_plotly_and_leave_no_global(page: WatchedPage) -> None:
    import base64

    bundle = base64.b64encode(modules.plotly().encode()).decode()
    spec = json.dumps(figure(curve(), **PLAIN).spec.to_static())
    page.page.set_content("<!doctype html><html lang=en><title>live</title><body></body>")
    code = modules.live("figure").replace("export default", "const { render } =")
    script = f"const BUNDLE = '{bundle}'; const SPEC = () => ({spec}); {code}; {LIVE}"
    page.page.add_script_tag(content=f"(() => {{ {script} }})();")
    page.page.wait_for_function("() => document.querySelectorAll('.main-svg').length >= 4")
    assert page.page.evaluate("asked.filter(q => q.ask === 'plotly').length") == 1
    assert page.page.evaluate("globalThis.Plotly === undefined")
    chart = page.page.locator(".chart").first
    chart.press("ArrowRight")
    chart.press("Enter")
    sent = page.page.evaluate("asked.at(-1)")
    assert {key: sent[key] for key in ("ask", "trace", "index", "x")} == {
        "ask": "clicked",
        "trace": 2,
        "index": 0,
        "x": 0,
    }
    page.assert_clean()
