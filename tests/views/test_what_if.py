"""What if: numbers as the theory's functions give them, in Python and on an exported page without a network."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from support.browser import WatchedPage
from workbench.analysis.conditioning import RULES, theory
from workbench.errors import ReportError
from workbench.views import what_if

SLIDERS = {slider["name"]: slider for slider in what_if().spec.facts["sliders"]}

MOVE = """(moves) => {
  const root = document.querySelector('.workbench.what_if');
  const [rule, source] = root.querySelectorAll('select');
  const turn = (element, value, event) => {
    element.value = value;
    element.dispatchEvent(new Event(event, {bubbles: true}));
  };
  turn(rule, moves.rule, 'change');
  turn(source, 'given', 'change');
  const set = {};
  for (const [name, value] of Object.entries(moves.sliders)) {
    const input = root.querySelector(`input[data-name="${name}"]`);
    turn(input, value, 'input');
    set[name] = Number(input.value);
  }
  if (!moves.given) { turn(source, 'bound', 'change'); set.failure = null; }
  const numbers = {};
  for (const tile of root.querySelectorAll('[data-number]')) numbers[tile.dataset.number] = tile.dataset.value;
  return { set, numbers };
}"""  # fmt: skip


def combinations() -> list[dict[str, Any]]:
    """All rules with the ends of all sliders and random places between; the failure rate given and from the bound."""
    rng = random.Random(0)
    made = []
    for rule, given in itertools.product(RULES, (True, False)):
        places: list[dict[str, float]] = [{name: s["low"] for name, s in SLIDERS.items()}]
        places.append({name: s["high"] for name, s in SLIDERS.items()})
        places += [{name: rng.uniform(s["low"], s["high"]) for name, s in SLIDERS.items()} for _ in range(12)]
        # Small loads, too: far beyond capacity nothing but noise is left to compare.
        places += [{**places[-1], "n": rng.randint(1, 12), "decay": rng.uniform(0.9, 0.999)} for _ in range(4)]
        made += [{"rule": rule, "given": given, "sliders": place} for place in places]
    return made


def test_the_numbers_are_those_of_the_theory() -> None:
    found = what_if(d_k=48, n=20, heads=4, depth=6, needed=2, threshold=2, delta=0.5).numbers()
    p = theory.failure_bound(20, 48, 0.5)
    assert found["interference_power"] == theory.interference_power(20, 48)
    assert found["average_capacity"] == theory.average_capacity(48, 2)
    assert found["worst_capacity"] == theory.worst_capacity(48, 0.5, 0.1)
    assert found["union_bound"] == theory.union_bound(20, 48, 0.5)
    assert found["stack_failure"] == theory.stack_failure(p, 6, 4)
    assert found["redundant_stack_failure"] == theory.redundant_stack_failure(p, 6, 4, 2)
    assert found["linear_range"] == theory.linear_range(48, 6, 4, 0.5)
    faint = what_if(rule="decay", n=4, decay=0.9).numbers()
    assert faint["snr"] == theory.retention_snr(3, 0.9, 64)
    assert faint["memory_span"] == theory.memory_span(0.9, 64)
    assert faint["failure_bound"] == pytest.approx(1 / faint["snr"])  # type: ignore[operator]


def test_one_pair_has_no_interference_and_a_forgotten_one_no_signal() -> None:
    alone = what_if(n=1).numbers()
    assert (alone["snr"], alone["snr_db"], alone["failure_bound"], alone["stack_failure"]) == (math.inf, math.inf, 0, 0)
    gone = what_if(rule="decay", n=1024, decay=0.5).numbers()
    assert (gone["snr"], gone["snr_db"], gone["head_failure"], gone["stack_failure"]) == (0, -math.inf, 1, 1)


@pytest.mark.parametrize("rule", ["delta", "gated_delta", "oja", "bcm", "softmax"])
def test_where_the_theory_is_silent_there_is_no_number(rule: str) -> None:
    silent = what_if(rule=rule)
    assert set(silent.numbers().values()) == {None}
    known = silent.numbers(failure=0.2)
    assert known["stack_failure"] == theory.stack_failure(0.2, 6, 4)
    assert known["snr"] is None
    assert silent.to_png()[:4] == b"\x89PNG"  # type: ignore[index]


def test_every_rule_is_offered() -> None:
    assert [rule["name"] for rule in what_if().spec.facts["rules"]] == list(RULES)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rule": "hebbian"}, 'no learning rule "hebbian"'),
        ({"d_k": 0}, "outside the slider's range, 1 to 512"),
        ({"n": 2.5}, "2.5 is not a whole number"),
        ({"decay": 1.0}, "outside"),
        ({"failure": 1.5}, "outside"),
        ({"threshold": math.nan}, "outside"),
        ({"heads": 2, "needed": 3}, "2 heads cannot need 3"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ReportError, match=said):
        what_if(**wrong)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ReportError, match='no setting "dk"'):
        what_if().numbers(dk=3)


@pytest.fixture
def tab(page: WatchedPage, tmp_path: Path) -> Page:
    what_if(d_k=48, n=20, threshold=1.23, needed=2).to_html(tmp_path / "what-if.html")
    page.open(tmp_path / "what-if.html").wait_for_selector("html[data-ready]")
    return page.page


def shown(text: str) -> float | None:
    return None if text == "" else float(text.replace("Infinity", "inf"))


def same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return one == other or math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6 if abs(other) < 1 else 0)


@pytest.mark.browser
def test_the_page_starts_with_the_numbers_of_python(page: WatchedPage, tab: Page) -> None:
    wanted = what_if(d_k=48, n=20, threshold=1.23, needed=2).numbers()
    for name, value in wanted.items():
        text = tab.locator(f"[data-number={name}]").get_attribute("data-value")
        assert same(shown(text or ""), value), name
    page.assert_clean()


@pytest.mark.browser
def test_sliders_on_a_page_give_what_python_gives(page: WatchedPage, tab: Page) -> None:
    start = what_if()
    compared = 0
    for moves in combinations():
        answer = tab.evaluate(MOVE, moves)
        settings = {"rule": moves["rule"], **answer["set"]}
        settings["needed"] = min(settings["needed"], settings["heads"])
        wanted = start.numbers(**settings)
        assert set(answer["numbers"]) == set(wanted)
        for name, value in wanted.items():
            assert same(shown(answer["numbers"][name]), value), (name, settings)
            compared += value is not None
    assert compared > 1000
    page.assert_clean()


@pytest.mark.browser
def test_sliders_move_by_keys_and_say_what_follows(page: WatchedPage, tab: Page) -> None:
    slider = tab.get_by_role("slider", name="load, n")
    slider.focus()
    slider.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "21 pairs"
    assert "SNR 3.80211 dB, capacity 40.0244 pairs" in tab.locator(".status").inner_text()
    tab.get_by_label("Learning rule").select_option("delta")
    assert "silent" in tab.locator(".status").inner_text()
    assert tab.locator("[data-number=snr] b").inner_text() == "–"
    assert "set one by hand" in tab.locator(".warning").inner_text()
    tab.get_by_role("button", name="Start again").click()
    assert slider.get_attribute("aria-valuetext") == "20 pairs"
    page.assert_clean()
