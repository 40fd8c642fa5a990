"""What Dualformer is, and where its paper's claims stand for the mazes and models of this package."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from workbench.mechanisms.frame import Card, Claim
from workbench.mechanisms.frame.card import Outcome
from workbench.storage.parts import parse

RESULTS = Path(__file__).parent / "results.json"
_HOW = "benchmarks/dualformer.py, 5 x 5 mazes, paired over mazes, 95 % intervals"
_PLANS = "share of shortest plans {:+.1%} [{:+.1%}, {:+.1%}]"
_TOKENS = "tokens of a trace {:+.1f} [{:+.1f}, {:+.1f}]"
_CLAIMS = (
    ("Thinking slow, it finds more shortest plans than a model that is taught whole traces.",
     "optimal, slow minus whole traces", 1),
    ("Its traces are shorter than those of a model that is taught whole traces.", "trace, slow minus whole traces", -1),
    ("Answering fast, it finds more shortest plans than a model that is taught plans alone.",
     "optimal, fast minus plans alone", 1),
    ("Left to choose, it finds more shortest plans than answering fast.", "optimal, auto minus fast", 1),
    ("Left to choose, it writes shorter traces than thinking slow.", "trace, auto minus slow", -1),
)  # fmt: skip
"""Each with the difference it is about, and whether that has to be above 0 or below it."""


@cache
def results() -> dict[str, Any] | None:
    """What `benchmarks/dualformer.py` measured of the shipped model and two trained beside it; None: nothing yet."""
    if not RESULTS.is_file():
        return None
    found: dict[str, Any] = parse(RESULTS.read_bytes(), RESULTS.name).plain()
    return found


@cache
def card() -> Card:
    """The card, with what was measured."""
    measured = results()
    gaps = {} if measured is None else measured["differences"]
    return Card(
        title="Dualformer: fast, slow and auto",
        arxiv="2410.09918",
        equation="answer = decoder(bos + [plan | create] …, encoder(maze)); each example is taught with a trace at one "
        "of five levels, drawn anew",
        map="Ordinary softmax attention, of the encoder over the maze, of the decoder over what it wrote, and across.",
        kind="self",
        grade="exact",
        parts={"cross_attn": ("cross", "exact")},
        cost="That of its answer: a fast one has 3 tokens a step, a slow one 3 or 5 a clause besides.",
        causal="either",
        code="facebookresearch/dualformer, CC-BY-NC 4.0; nothing of it is used. An encoder-decoder of T5's layers "
        "stands in for theirs with rotary positions.",
        claims=tuple(_claim(says, gaps.get(name), sign) for says, name, sign in _CLAIMS),
    )


def _claim(says: str, gap: list[float] | None, sign: int) -> Claim:
    """A claim that a difference (mean, low, high) is above 0, or below it where sign is −1; None: not examined."""
    if gap is None:
        return Claim(says)
    _, low, high = gap
    ahead = low > 0 if sign > 0 else high < 0
    outcome: Outcome = "holds" if ahead else "does not hold" if (high < 0 if sign > 0 else low > 0) else "undecided"
    return Claim(says, _HOW, (_TOKENS if sign < 0 else _PLANS).format(*gap), outcome)
