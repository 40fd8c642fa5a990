"""A capture shows the pattern of a hand-written module as float64 does, or says why it does not: nothing third."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import workbench
from support.drawn_attention import Drawn, Model
from workbench.errors import CaptureError

PLAIN = ("linear", "function", "matrix", "einsum", "sequence first", "flat")


def captured(drawn: Drawn) -> str:
    """ "right", or why the module was refused; anything else fails."""
    model = Model(drawn).eval()
    x = model.inputs()
    with torch.no_grad(), workbench.attach(model, check=False) as wb:
        bare = model(x)
        refusal = None
        try:
            with wb.capture([]) as cap:
                y = model(x)
        except CaptureError as error:
            refusal = error
    if refusal is not None:
        assert refusal.hint
        assert refusal.site == "attn" or "attn" in refusal.message
        return refusal.message
    assert torch.equal(bare, y)
    assert [site.site.call for site in cap] == list(range(drawn.calls))
    for site, given in zip(cap, model.seen, strict=True):
        want, _ = model.attn.by_hand(given)
        got = site.pattern.dense().double()
        assert got.shape == want.shape, drawn
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4, msg=lambda text: f"{drawn}\n{text}")
    return "right"


@pytest.mark.parametrize("block", range(8))
def test_drawn_modules(block: int) -> None:
    """640 modules. All whose heads enter a linear function as they are, and tell themselves apart, are captured."""
    found: Counter[str] = Counter()
    for seed in range(block * 80, block * 80 + 80):
        drawn = Drawn.draw(seed)
        outcome = captured(drawn)
        found["right" if outcome == "right" else "refused"] += 1
        if drawn.followed in PLAIN:
            assert outcome == "right" or "several layouts" in outcome or drawn.rows, (drawn, outcome)
    assert found["right"] > 40, found


def test_drawn_modules_whose_calls_are_blocks_of_rows() -> None:
    """Where their rows enter the projection, and heads and examples can be told apart, they make one map."""
    drawn = [one for one in map(Drawn.draw, range(640)) if one.rows and one.followed in PLAIN]
    outcomes = [captured(one) for one in drawn]
    assert len(outcomes) > 12
    assert outcomes.count("right") > len(outcomes) / 2, Counter(outcomes)
