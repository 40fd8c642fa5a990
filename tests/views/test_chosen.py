"""What is chosen and set in a view goes wherever the view goes: pictures, pages, reports; and nowhere else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from playwright.sync_api import Page

import workbench
from support.browser import WatchedPage
from support.every_view import CHOOSING, FORMS, SETTING, VIEWS, WORDS, capture, image_capture, made
from workbench import views
from workbench.errors import ReportError
from workbench.storage import disk
from workbench.views import SHARED, Selection, SharedSelection, View
from workbench.views.base import modules
from workbench.views.base import page as pages
from workbench.views.base.kinds import kind_of
from workbench.views.base.selection import Scope
from workbench.views.base.spec import ViewSpec


@pytest.fixture(autouse=True)
def _nothing_selected() -> Iterator[None]:
    yield
    SHARED.value = Selection()


def alone(kind: str) -> View:
    """A view with a selection of its own."""
    view = copy(made(kind))
    view._shared = SharedSelection()
    return view


@cache
def picture(kind: str) -> bytes:
    """Of a view in which nothing is chosen or set."""
    found = alone(kind).to_png()
    assert isinstance(found, bytes)
    return found


def held(html: str) -> list[dict[str, Any]]:
    """The specs of a page."""
    found = re.findall(r'<script type="application/json" id="view-\d+"[^>]*>([^<]*)</script>', html)
    return [json.loads(text) for text in found]


def test_no_kind_of_view_is_forgotten() -> None:
    """What can be chosen and set in a kind is here: kinds that follow the selection, and those that have settings."""
    follow = [kind for kind in VIEWS if "frame.onSelect(" in modules.live(kind, minified=False)]
    have = [kind for kind in VIEWS if kind_of(kind).schema["properties"].get("state", {}).get("properties")]
    assert sorted(CHOOSING) == sorted([*follow, *FORMS])
    assert sorted(SETTING) == sorted([*have, *FORMS])


@pytest.mark.parametrize("kind", CHOOSING)
def test_pictures_and_pages_show_what_is_chosen(kind: str) -> None:
    view = alone(kind)
    before, page = picture(kind), view.to_html()
    view.select(layer=77, heads=(99,), query=10_000, key=10_000, token=10_000, example=10_000)  # which is not there
    if kind not in ("head_atlas", "head wall"):  # which begin with a head marked, and mark no other for it
        assert view.to_png() == before
    view._shared = SharedSelection()
    view.select(**CHOOSING[kind])
    assert view.to_png() != before
    assert view.to_html() != page
    selection = held(str(view.to_html()))[0]["selection"]
    assert {name: selection[name] for name in CHOOSING[kind]} == json.loads(json.dumps(CHOOSING[kind]))


@pytest.mark.parametrize("kind", ["attention_pattern", "compare", "head_gallery", "saliency_map"])
def test_a_notebook_keeps_the_picture_of_what_is_chosen(kind: str) -> None:
    view = alone(kind).select(**CHOOSING[kind])
    assert view._bundle("one")["image/png"] == view.to_png() != picture(kind)


@pytest.mark.parametrize("kind", SETTING)
def test_pictures_and_pages_show_what_is_set(kind: str) -> None:
    view = alone(kind)
    view.set_state(**SETTING[kind])
    assert view.to_png() != picture(kind)
    assert SETTING[kind].items() <= held(str(view.to_html()))[0]["state"].items()


@pytest.mark.parametrize("kind", SETTING)
def test_what_cannot_be_set_is_refused(kind: str) -> None:
    with pytest.raises(ReportError, match="state"):
        alone(kind).set_state(nonsense=3)


def test_a_report_keeps_what_was_chosen_when_a_view_was_added() -> None:
    cap = capture()
    view = views.attention_pattern(cap)
    view.select(layer=1, heads=(2,), query=5).set_state(scale="linear")
    report = workbench.Report("Heads").add(view).add(cap)
    view.select(layer=0, heads=(0,), query=1).set_state(scale="log")
    report.add(view)
    specs = held(report.to_html())
    patterns = [spec for spec in specs if spec["kind"] == "attention_pattern"]
    assert [(spec["selection"]["heads"], spec["selection"]["query"]) for spec in patterns] == [
        ([2], 5),
        ([2], 5),
        ([0], 1),
    ]
    assert [spec["state"] for spec in patterns] == [{"scale": "linear"}, {}, {"scale": "log"}]
    atlas = next(spec for spec in specs if spec["kind"] == "head_atlas")
    assert atlas["selection"]["heads"] == [2]


def test_the_page_of_a_result_keeps_what_is_chosen() -> None:
    views.head_atlas(capture()).select(layer=1, heads=(2,))
    found = held(str(views.page_of(capture())))
    assert [spec["selection"]["heads"] for spec in found] == [[2]] * len(found)


# One selection for each model and for each of its inputs.


def test_heads_are_chosen_in_a_model_and_positions_in_its_inputs() -> None:
    shared = SharedSelection()
    one, other, same_inputs = Scope("a", "x"), Scope("b", "y"), Scope("b", "x")
    shared.select(one, layer=1, heads=(2,), query=3)
    assert shared.of(one) == Selection(layer=1, heads=(2,), query=3)
    assert shared.of(other) == Selection()
    assert shared.of(same_inputs) == Selection(query=3)
    shared.select(layer=4)
    assert [shared.of(scope).layer for scope in (one, other)] == [4, 4]
    kept = shared.copy()
    shared.select(one, layer=0)
    assert kept.of(one).layer == 4


def test_views_are_told_of_their_own_scope() -> None:
    text, image = views.head_atlas(capture()), views.image_attention(*image_capture())
    told: list[Selection] = []
    end = image.on_select(told.append)
    text.select(layer=1, heads=(1,), query=2)
    assert (told, image.selection) == ([], Selection())
    image.select(example=1)
    assert told == [Selection(example=1)]
    end()


def test_views_that_do_not_know_their_model_follow_the_only_one() -> None:
    shared = SharedSelection()
    unknown = Scope()
    shared.join(Scope("a"))
    shared.select(Scope("a"), layer=1)
    assert shared.of(unknown).layer == 1
    shared.join(Scope("b"))
    assert shared.of(unknown).layer is None


def test_a_layer_without_a_site_is_meant_wherever_it_is() -> None:
    shared, scope = SharedSelection(), Scope("a", "x")
    shared.select(scope, layer=0, heads=(1,), site="encoder.0")
    shared.select(scope, query=2)
    assert shared.of(scope).site == "encoder.0"
    shared.select(scope, layer=1, heads=(3,))
    assert shared.of(scope) == Selection(layer=1, heads=(3,), query=2)
    shared.select(layer=0, site="encoder.0")
    assert shared.of(scope).site == "encoder.0"


def test_a_comparison_of_two_models_is_of_none() -> None:
    model = {"model_class": "a", "model_name": "b", "parameters": 3}
    other = model | {"parameters": 4}
    assert Scope.of({"a": model, "b": model}) == Scope.of(model) != Scope.of(other)
    assert Scope.of({"a": model, "b": other}) == Scope()


@pytest.fixture(scope="module")
def all_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind, with what can be chosen and set in it."""
    specs: list[ViewSpec] = []
    for kind in VIEWS:
        view = alone(kind).set_state(**SETTING.get(kind, {}))
        specs.append(view.select(**CHOOSING.get(kind, {})).current)
    return disk.write(tmp_path_factory.mktemp("page") / "set.html", pages.render("Set", specs))


def opened(watched: WatchedPage, file: Path, address: str = "") -> Page:
    watched.page.goto(file.as_uri() + address)
    watched.page.wait_for_selector("html[data-ready]")
    return watched.page


@pytest.mark.browser
def test_a_page_opens_as_the_view_was_left(page: WatchedPage, all_set: Path) -> None:
    tab = opened(page, all_set)
    shown = tab.evaluate(
        """Object.fromEntries([...document.querySelectorAll('.workbench')].map((view) => [view.className.split(' ')[1],
             [...view.querySelectorAll('.controls .field, .sliders .slider')].map((field) => [
               field.querySelector('span').textContent,
               field.querySelector('select')?.selectedOptions[0].textContent ?? field.querySelector('input').value,
               field.querySelector('input')?.checked ?? null])]))"""
    )
    wanted = {
        "saliency_map": {"encoder-output saliency", "attention", "standardised per token", "L1H2"},
        "capacity_curves": {"noisy keys", "L1H2"},
        "conditioning_curves": {"latent inhibition"},
        "what_if": {"40", "2"},
        "tensor_peek": {"2", "log"},
        "compare": {"linear", "L0H1 and L1H1"},
        "attention_pattern": {"logarithmic", "0 to 1", "2"},
        "head_atlas": {"Sink"},
        "token_strip": {"effect"},
    }
    for kind, values in wanted.items():
        told = {re.split(r" \(|, cosine", value)[0] for _, value, _ in shown[kind]}
        assert values <= told, kind
    assert [on for name, _, on in shown["attention_pattern"] if name.startswith("Hid")] == [True]
    assert [on for name, _, on in shown["conditioning_curves"] if name == "hebb"] == [False]
    assert tab.locator(".head_gallery h3", has_text="word5").count() == 1
    assert tab.locator(".head_page h3").inner_text() == "L1H2"
    assert "L1H1 on image two, from the patch" in tab.locator(".image_attention h3").first.inner_text()
    assert tab.evaluate("location.hash") == ""
    page.assert_clean()


@pytest.mark.browser
def test_a_choice_in_one_model_leaves_another_alone(page: WatchedPage, tmp_path: Path) -> None:
    text, image = views.attention_pattern(capture()), views.image_attention(*image_capture())
    both = disk.write(tmp_path / "both.html", pages.render("Two models", [text.spec, image.spec]))
    tab = opened(page, both)
    before = tab.locator(".image_attention h3").first.inner_text()
    tab.locator(".attention_pattern .field", has_text="Site").locator("select").select_option("1")
    tab.locator(".attention_pattern .controls select").nth(1).select_option("1")
    assert tab.locator(".image_attention h3").first.inner_text() == before
    tab.locator(".image_attention .tiles button", has_text="L0H1").first.click()
    assert tab.locator(".image_attention h3").first.inner_text() != before
    address = tab.evaluate("location.hash")
    assert re.match(r"#L1H1,s=.*,2\.L0H1", address), address
    again = opened(page, both, address)
    assert "L0H1" in again.locator(".image_attention h3").first.inner_text()
    assert again.locator(".attention_pattern .controls select").nth(1).input_value() == "1"
    page.assert_clean()


@pytest.mark.browser
def test_a_choice_on_one_prompt_leaves_another_alone(page: WatchedPage, tmp_path: Path) -> None:
    """Two prompts of one model: heads go together, queries do not."""
    both = [views.attention_pattern(capture(tokens=WORDS[n : n + 12])).spec for n in (0, 20)]
    tab = opened(page, disk.write(tmp_path / "both.html", pages.render("Two prompts", both)))
    query, head = (tab.locator(f".attention_pattern {name}") for name in (".row h3", ".panel figcaption"))
    before = query.nth(1).inner_text()
    tab.locator(".attention_pattern .controls select").nth(1).select_option("2")
    tab.locator(".attention_pattern").first.locator(".strip .token").nth(4).click()
    assert "(4)" in query.nth(0).inner_text()
    assert query.nth(1).inner_text() == before
    assert [text[:4] for text in head.all_inner_texts()] == [head.first.inner_text()[:4]] * 2
    page.assert_clean()


@pytest.mark.browser
def test_each_figure_of_a_page_opens_as_it_was_added(page: WatchedPage, tmp_path: Path) -> None:
    """Until someone chooses: then all views of the model follow."""
    view, report = views.attention_pattern(capture()), workbench.Report("Heads")
    for layer, head, query in ((1, 2, 5), (0, 1, 3)):
        report.add(view.select(layer=layer, heads=(head,), query=query))
    tab = opened(page, report.write(tmp_path / "report.html"))
    query, head = (tab.locator(f".attention_pattern {name}") for name in (".row h3", ".panel figcaption"))
    assert [text[:4] for text in head.all_inner_texts()] == ["L1H2", "L0H1"]
    assert [text.rpartition(" ")[2] for text in query.all_inner_texts()] == ["(5)", "(3)"]
    tab.evaluate("location.hash = 'L1H0,q=2'")
    tab.wait_for_function("() => document.querySelector('.attention_pattern .row h3').innerText.includes('(2)')")
    assert [text[:4] for text in head.all_inner_texts()] == ["L1H0", "L1H0"]
    page.assert_clean()


@pytest.mark.browser
def test_a_pair_can_be_picked_again(page: WatchedPage, tmp_path: Path) -> None:
    """After a choice elsewhere has brought another pair; where no head of a pair is chosen the picked one is shown."""
    tab = opened(page, Path(made("two mechanisms").to_html(tmp_path / "compare.html")))
    picker = tab.locator(".compare .field", has_text="Heads").locator("select")
    first = tab.locator(".compare figcaption").first
    picker.select_option(index=2)
    assert first.inner_text() == "A L0H2"
    tab.evaluate("location.hash = 'L1H3,s=model.layers.1.self_attn'")
    tab.wait_for_function("() => document.querySelector('.compare figcaption').innerText === 'A L0H3'")
    assert picker.evaluate("select => select.selectedIndex") == 3
    picker.select_option(index=2)
    assert first.inner_text() == "A L0H2"
    tab.evaluate("globalThis[Symbol.for('workbench.selection')].select({ model: null }, { layer: 9, heads: [9] })")
    assert first.inner_text() == "A L0H2"
    page.assert_clean()


def test_a_pair_that_python_picks_is_that_of_the_chosen_head() -> None:
    view = alone("two mechanisms").select(layer=1, heads=(3,))
    pair = view.to_png()
    view.set_state(pair="1")
    assert (view.selection.layer, view.selection.heads) == (0, (1,))
    assert view.to_png() != pair
    view.select(layer=1, heads=(1,)).set_state(pair="3").set_state(pair="1")
    assert (view.selection.layer, view.selection.heads) == (0, (1,))
    view.select(layer=9, heads=(9,))
    assert view._pair() == 1  # type: ignore[attr-defined]


@pytest.mark.browser
def test_an_address_that_someone_follows_is_kept_whole(page: WatchedPage, tmp_path: Path) -> None:
    """The pair of a comparison chooses a head, which is written into the address before later views have read it."""
    specs = [made("compare").spec, made("head_atlas").spec]
    tab = opened(page, disk.write(tmp_path / "both.html", pages.render("Followed", specs)))
    states = [{"pair": "1"}, {"metric": "Sink"}]
    parts = [f"view-{i}={quote(json.dumps(state))}" for i, state in enumerate(states)]
    tab.evaluate("address => { location.hash = address; }", ",".join(parts))
    tab.wait_for_function("() => /Sink/.test(document.querySelector('.head_atlas figcaption, .head_atlas').innerText)")
    address = unquote(tab.evaluate("location.hash"))
    assert 'view-0={"pair":"1"}' in address
    assert 'view-1={"metric":"Sink"}' in address
    page.assert_clean()
