"""Claims of cost: what cards say of them is what the figures say, and what is counted is what is done."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from workbench import mechanisms
from workbench.mechanisms.frame.findings import COSTS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the benchmark by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return import_module(f"costs.{name}")

    return load


def test_cards_say_what_the_figures_say(script: Any) -> None:
    judged = script("claims").JUDGES
    for room, says in judged:
        assert says in [claim.says for claim in mechanisms.get(room).card.claims], (room, says)
    if not COSTS.is_file():
        assert all(
            claim.outcome == "not examined" for room, says in judged for claim in mechanisms.get(room).card.claims
            if claim.says == says
        )  # fmt: skip
        return
    data = json.loads(COSTS.read_text(encoding="utf-8"))
    made = script("claims").claims(data)
    assert made == data["claims"]
    assert {(room, says) for room, each in made.items() for says in each} == set(judged)
    for room, says in judged:
        [claim] = [claim for claim in mechanisms.get(room).card.claims if claim.says == says]
        assert {"how": claim.how, "found": claim.found, "outcome": claim.outcome} == made[room][says]


def _point(ratio: float, low: float, high: float, length: int = 8192) -> dict[str, Any]:
    return {"length": length, "seconds": 1.0, "seconds_over_sdpa": ratio, "low": low, "high": high, "mib": 10.0}


def _grows(exponent: float, low: float, high: float, *points: dict[str, Any]) -> dict[str, Any]:
    points = points or (_point(0.5, 0.4, 0.6, 512), _point(0.5, 0.4, 0.6))
    return {"exponent": exponent, "exponent_low": low, "exponent_high": high, "points": list(points)}


def _data() -> dict[str, Any]:
    rooms = {
        "causal SDPA": _grows(1.9, 1.8, 2.0), "SDPA of all tokens": _grows(1.9, 1.8, 2.0),
        "agent": _grows(1.0, 0.9, 1.1),
        "routing": _grows(1.5, 1.4, 1.55), "s2": _grows(1.7, 1.6, 1.8, _point(0.15, 0.14, 0.16)),
        "sqa": _grows(1.9, 1.8, 2.0, _point(0.5, 0.45, 0.55)),
        "sqa:xsqa": _grows(1.9, 1.8, 2.0, _point(0.25, 0.2, 0.3)),
        "sqa:gqa": _grows(1.9, 1.8, 2.0, _point(1.0, 0.97, 1.03)),
        "sqa:mqa": _grows(1.9, 1.8, 2.0, _point(1.0, 0.9, 1.1)),
    }  # fmt: skip
    forms = {
        name: {"heads": n, "kv_heads": n, "counted": 100 * n, "formula": 100 * n, "share": n / 4}
        for name, n in (("mha", 4), ("sqa", 2))
    }
    pair = {"length": 1024, "ratios": [0.5, 0.6], "mib_ratios": [0.1, 0.2]}
    stream = {str(n): {"numbers": 66, "seconds": [1.0, 1.0]} for n in (1, 512)}
    counted = {
        "sqa": forms, "halo": pair, "rcmha": {**pair, "mib_ratios": [1.2, 1.3]},
        "aaren": {"stream": stream, "exponents": [0.0, 0.1], "parameters": 1001, "plain_parameters": 1000},
        "s2": {"length": 960, "kept": [160, 80], "block": 80, "local_blocks": 1, "vert_stride": 12, "density": 0.1},
    }  # fmt: skip
    return {"rooms": rooms, "counted": counted}


def _outcomes(script: Any, data: dict[str, Any]) -> dict[str, list[str]]:
    made = script("claims").claims(data)
    return {room: [each["outcome"] for each in of_room.values()] for room, of_room in made.items()}


def test_outcomes_follow_from_the_figures(script: Any) -> None:
    data = _data()
    found = _outcomes(script, data)
    assert found == {
        "agent": ["holds"], "routing": ["holds"], "halo": ["holds"], "aaren": ["holds"], "sqa": ["holds", "holds"],
        "s2": ["holds", "holds"], "rcmha": ["does not hold"],
    }  # fmt: skip
    rooms, counted = data["rooms"], data["counted"]
    rooms["agent"] = _grows(1.4, 1.3, 1.5)
    rooms["routing"] = _grows(1.5, 1.4, 1.7)
    rooms["sqa:gqa"] = _grows(1.9, 1.8, 2.0, _point(0.7, 0.6, 0.8))
    rooms["s2"] = _grows(1.7, 1.6, 1.8, _point(0.25, 0.2, 0.3))
    counted["sqa"]["sqa"]["counted"] += 1
    counted["aaren"]["stream"]["512"]["numbers"] = 70
    counted["s2"]["kept"] = [480, 80]
    counted["halo"]["ratios"] = [0.5, 1.2]
    counted["rcmha"]["mib_ratios"] = [0.5, 0.6]
    assert _outcomes(script, data) == {
        "agent": ["does not hold"], "routing": ["undecided"], "halo": ["undecided"], "aaren": ["does not hold"],
        "sqa": ["does not hold", "does not hold"], "s2": ["does not hold", "undecided"], "rcmha": ["holds"],
    }  # fmt: skip
    del rooms["agent"], counted["sqa"]
    assert set(_outcomes(script, data)) == {"routing", "halo", "aaren", "sqa", "s2", "rcmha"}


def test_operations_are_counted_as_the_formula_has_them(script: Any) -> None:
    forms = script("counted").operations(32)
    whole = forms["mha"]["counted"]
    assert whole == 4 * 12 * 32**2 * 64
    for name, each in forms.items():
        assert each["counted"] == each["formula"], name
        assert each["counted"] / whole == pytest.approx(each["share"])
    assert forms["xsqa"]["heads"] == 3


def test_the_state_of_a_stream_and_a_cache_are_counted(script: Any) -> None:
    found = script("counted").stream(64, 1)
    assert {each["numbers"] for each in found["stream"].values()} == {12 * (64 + 2)}
    assert found["parameters"] - found["plain_parameters"] == 12 * 64
    cache = script("counted").cache(1024)
    assert len(cache["kept"]) == 12
    assert sum(cache["kept"]) < 12 * 1024 / 4
