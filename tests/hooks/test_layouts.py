"""A capture shows the pattern of a hand-written module as float64 does, or says why it does not: nothing third."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

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


class Windows(nn.Module):
    """Attention in windows of four positions, whose examples, windows and heads are one axis, in some order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.num_heads, self.order = 2, order
        self.qkv, self.o = nn.Linear(6, 18), nn.Linear(6, 6)

    def parts(self, x: Tensor) -> list[Tensor]:
        """q, k and v [example, window, head, position, d]."""
        return [t.unflatten(1, (-1, 4)).unflatten(-1, (2, 3)).transpose(2, 3) for t in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        to = ["bwh".index(one) for one in self.order]
        merged = [t.permute(*to, 3, 4) for t in self.parts(x)]
        q, k, v = (t.flatten(0, 2) for t in merged)
        z = ((q @ k.mT).softmax(-1) @ v).view(merged[0].shape)
        back = [to.index(axis) for axis in range(3)]
        return self.o(z.permute(*back, 3, 4).transpose(2, 3).flatten(3).flatten(1, 2))  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("order", map("".join, permutations("bwh")))
def test_what_does_not_show_of_one_example_or_one_window_is_looked_for_again(order: str) -> None:
    torch.manual_seed(0)
    model = Windows(order)
    for first in ((1, 12, 6), (3, 4, 6)):
        with workbench.attach(model, check=False) as wb:
            for size in (first, (3, 12, 6), first):
                x = torch.randn(size)
                with wb.capture([]) as cap:
                    model(x)
                q, k, _ = model.parts(x)
                want = (q @ k.mT).softmax(-1).flatten(0, 1)
                torch.testing.assert_close(cap[0].pattern.dense(), want, msg=lambda text, size=size: f"{size} {text}")


@torch.no_grad()
@pytest.mark.parametrize("order", ["bhw", "whb"])
def test_an_edit_by_a_layout_of_fewer_examples_is_none(order: str) -> None:
    model = Windows(order)
    one, three = torch.randn(1, 12, 6), torch.randn(3, 12, 6)
    q, k, v = model.parts(three)
    z = (q @ k.mT).softmax(-1) @ v
    z[:, :, 1] = 0
    want = model.o(z.transpose(2, 3).flatten(3).flatten(1, 2))
    with workbench.attach(model, check=False) as wb:
        wb.verify(one).raise_if_failed()
        with pytest.raises(CaptureError, match="run it again"), wb.ablate((0, 1)):
            model(three)
        with wb.ablate((0, 1)):
            torch.testing.assert_close(model(three), want)
        with pytest.raises(CaptureError, match='on the "meta" device'), wb.capture([]):
            model.to("meta")(one.to("meta"))
