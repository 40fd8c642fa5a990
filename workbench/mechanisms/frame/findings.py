"""What was found of the claims on the cards: scripts measure it and write it down, nobody types it.

`benchmarks/rooms.py` has claims of quality, `benchmarks/mechanisms.py` those of cost, `benchmarks/studied.py` those of
studies and `benchmarks/matvlm.py` those of distilled models, beside their figures.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

from workbench.mechanisms.frame.card import Card, Claim

_WEIGHTS = Path(__file__).parents[1] / "weights"
FINDINGS, COSTS, STUDIES, DISTILLED = (_WEIGHTS / f"{name}.json" for name in ("claims", "cost", "studies", "distilled"))


def with_findings(name: str, card: Card) -> Card:
    """The card of a mechanism, with what was found of those claims that it leaves open; the same one if nothing was."""
    found = findings().get(name, {})
    if not any(claim.says in found and claim.outcome == "not examined" for claim in card.claims):
        return card
    return replace(card, claims=tuple(_filled(claim, found.get(claim.says)) for claim in card.claims))


@cache
def findings() -> dict[str, dict[str, dict[str, str]]]:
    """By mechanism and claim: "how", "found" and "outcome"."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for path in (FINDINGS, COSTS, STUDIES, DISTILLED):
        if path.is_file():
            held = json.loads(path.read_text(encoding="utf-8"))
            for name, claims in (held if path == FINDINGS else held["claims"]).items():
                found.setdefault(name, {}).update(claims)
    return found


def _filled(claim: Claim, found: dict[str, str] | None) -> Claim:
    if found is None or claim.outcome != "not examined":
        return claim
    return replace(claim, how=found["how"], found=found["found"], outcome=found["outcome"])  # type: ignore[arg-type]
