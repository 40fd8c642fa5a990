"""What cards say of distilled models follows from the runs that are kept, and the rules from intervals."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from workbench import mechanisms
from workbench.mechanisms.frame import findings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rules() -> Iterator[Any]:
    """benchmarks/trained/distilled.py, as its script imports it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield import_module("trained.distilled")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in [name for name in sys.modules if name.partition(".")[0] in ("trained", "shared")]:
            del sys.modules[name]


def test_the_card_says_what_follows_from_the_runs(rules: Any) -> None:
    data = json.loads(findings.DISTILLED.read_text(encoding="utf-8"))
    made = rules.claims(data)
    assert made == data["claims"]
    card = mechanisms.get(rules.MECHANISM).card
    said = {
        claim.says: {"how": claim.how, "found": claim.found, "outcome": claim.outcome}
        for claim in card.claims
        if claim.outcome != "not examined"
    }
    assert said == made[rules.MECHANISM]
    assert {claim.says for claim in card.claims} == {rules.NEARLY, rules.BEGINS, rules.FASTER}


def _run(replaced: int, seed: int, right: float, nats: float, seeded: bool = True) -> dict[str, Any]:
    return {
        "replaced": replaced, "seeded": seeded, "seed": seed, "right": {"a": right, "b": right - 0.1},
        "nats": [nats - 0.1, nats + 0.1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "two", "outcome"), [(0.99, 0.98, "holds"), (0.99, 0.6, "undecided"), (0.7, 0.6, "does not hold")]
)
def test_a_quarter_lies_between_one_layer_and_two(rules: Any, one: float, two: float, outcome: str) -> None:
    runs = [_run(0, 0, 1.0, 0.0)]
    runs += [_run(n, s, r + 0.001 * s, 0.5) for n, r in ((1, one), (2, two)) for s in range(3)]
    found = rules.nearly(runs)
    assert found.outcome == outcome
    assert found.found.startswith("0.950 before; 1 of 6 replaced")
    assert rules.nearly(runs[:-1]) is None  # of two seeds nothing is said
    assert rules.nearly(runs[1:]) is None


@pytest.mark.parametrize(
    ("drawn", "outcome"), [(2.0, "holds"), (1.0, "undecided"), (0.5, "does not hold")], ids=lambda value: str(value)
)
def test_students_are_compared_seed_by_seed(rules: Any, drawn: float, outcome: str) -> None:
    off = (0.001, -0.001, 0.0)
    runs = [_run(2, s, 0.5, 1.0 + s) for s in range(3)]
    runs += [_run(2, s, 0.5, drawn + s + off[s], seeded=False) for s in range(3)]
    found = rules.begins(runs[::-1])
    assert found.outcome == outcome
    assert f"nearer by {drawn - 1:.2f}" in found.found
    assert rules.begins(runs[:5]) is None


@pytest.mark.parametrize(
    ("long", "outcome"), [((0.4, 0.5), "holds"), ((0.9, 1.1), "undecided"), ((1.4, 1.5), "does not hold")]
)
def test_faster_is_below_one_where_inputs_are_long(rules: Any, long: tuple[float, float], outcome: str) -> None:
    times = {
        "attention": {"64": [1.0, 1.0], "128": [4.0, 4.0], "256": [16.0, 16.0]},
        "mamba-2": {"64": [3.0, 3.2], "128": [6.0, 6.0], "256": [16 * each for each in long]},
    }
    found = rules.faster(times)
    assert found.outcome == outcome
    assert f"({long[0]:.2f} to {long[1]:.2f}) at 256" in found.found
    assert rules.slopes(times)["attention"] == pytest.approx(2)
    assert rules.faster({}) is None
