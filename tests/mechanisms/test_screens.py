"""Generated screens, V2P's pointer on them, and Agent S2's experts with their routers."""

import pytest
import torch

from workbench.errors import TaskError, WorkbenchError
from workbench.mechanisms.screens import ARMS, draw_screens, pointer, train
from workbench.mechanisms.screens.drawing import COLOURS
from workbench.mechanisms.screens.experts import (
    EXPERTS,
    Requests,
    answer,
    by_action,
    ends,
    fit_router,
    marked,
    marks,
    phrases,
    request,
    right,
)
from workbench.mechanisms.screens.study import mixed, pointed


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_elements_are_drawn_where_their_boxes_are() -> None:
    drawn = draw_screens(40, 3)
    assert torch.equal(drawn.pixels, draw_screens(40, 3).pixels)
    asked = drawn.kinds * len(COLOURS) + drawn.colours
    assert all(len(set(row)) == 6 for row in asked.tolist())
    x0, y0, x1, y1 = drawn.boxes.unbind(-1)
    assert bool(((x0 >= 0) & (y0 >= 0) & (x1 <= 96) & (y1 <= 96) & (x1 - x0 >= 5) & (y1 - y0 >= 4)).all())
    for i in range(40):
        for k in range(6):
            for j in range(k):
                wide = min(x1[i, k], x1[i, j]) - max(x0[i, k], x0[i, j])
                high = min(y1[i, k], y1[i, j]) - max(y0[i, k], y0[i, j])
                assert min(float(wide), float(high)) <= 0
    paints = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    buttons = (drawn.kinds == 0).nonzero().tolist()
    for i, k in buttons:
        left, top, right_, bottom = drawn.boxes[i, k].int().tolist()
        seen = drawn.pixels[i, :, top:bottom, left:right_].mean((1, 2))
        assert int((paints - seen).norm(dim=1).argmin()) == int(drawn.colours[i, k])
    with pytest.raises(TaskError):
        draw_screens(0)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_is_measured(arm: str) -> None:
    found = pointed(train(arm, seed=1, steps=2), 20)
    assert 0 <= found["hits"] <= 1
    if arm != "boxes":
        total = found["weight on other elements"] + found["weight on the desktop"]
        assert found["weight off the target"] == pytest.approx(total, abs=1e-5)
    with pytest.raises(WorkbenchError, match="no arm"):
        train("box")


def test_the_pointer_is_softmax_over_patches_and_learns() -> None:
    drawn = draw_screens(8, 0)
    model = train("v2p", steps=1)
    weights = model(drawn.pixels, drawn.asked)
    torch.testing.assert_close(weights.sum(-1), torch.ones(8))
    torch.manual_seed(0)
    model, losses = pointer.Pointer(), []
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(25):
        loss = pointer._loss(model, "v2p", drawn)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


class _Knows:
    """A pointer that has all its weight on the patch in the middle of the element that is asked for."""

    def __init__(self, drawn: object) -> None:
        self.drawn = drawn

    def __call__(self, pixels: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        all_asked = self.drawn.kinds * len(COLOURS) + self.drawn.colours  # type: ignore[attr-defined]
        which = (all_asked == asked[:, None]).float().argmax(1)
        return self.drawn.boxes[torch.arange(len(pixels)), which] / 96  # type: ignore[attr-defined]


def test_each_expert_is_right_where_it_has_what_it_needs() -> None:
    drawn = draw_screens(300, 5)
    asked = request(drawn, random())
    assert bool((asked.described | asked.named).all())
    assert not bool(asked.in_tree[drawn.kinds == 2].any())
    clear = Requests(drawn, asked.described, asked.named, drawn.names, asked.in_tree)
    points, known = answer(_Knows(drawn), clear, random(1))
    hits = right(points, drawn)
    assert bool(hits[asked.described, EXPERTS.index("visual")].all())
    assert bool(hits[asked.named, EXPERTS.index("textual")].all())
    in_tree = asked.named & asked.in_tree[:, 0]
    assert bool(hits[in_tree, EXPERTS.index("structural")].all())
    assert torch.equal(known[:, 2] > 0, in_tree)
    assert float(hits[~asked.named, 1].float().mean()) < 0.4  # an element at random
    assert bool(hits.any(1).all())


WORDS = torch.tensor([[10.0, 20.0, 40.0, 28.0], [50.0, 21.0, 90.0, 27.0], [4.0, 40.0, 24.0, 50.0]])


@pytest.mark.parametrize(
    ("first", "last", "where"),
    [(0, 1, [[10, 24], [90, 24]]), (1, 2, [[50, 24], [24, 45]]), (2, 2, [[4, 45], [24, 45]])],
)
def test_a_text_is_marked_from_the_left_of_its_first_word_to_the_right_of_its_last_at_half_height(
    first: int, last: int, where: list[list[float]]
) -> None:
    assert ends(WORDS[first], WORDS[last]).tolist() == where


def test_texts_that_were_read_are_marked_whole() -> None:
    drawn = draw_screens(120, 7)
    which, there = phrases(drawn)
    rows = torch.arange(120)
    for i in rows[there].tolist():
        texts = [k for k in range(6) if int(drawn.kinds[i, k]) == 2]
        order = sorted(texts, key=lambda k: (float(drawn.boxes[i, k, 1]), float(drawn.boxes[i, k, 0])))
        assert which[i].tolist() == [order[0], order[-1]]
    asked = request(drawn, random())
    clear = Requests(drawn, asked.described, asked.named, drawn.names, asked.in_tree)
    pointer = train("v2p", steps=1)
    read, seen = marks(pointer, clear, which)
    assert torch.equal(read, ends(drawn.boxes[rows, which[:, 0]], drawn.boxes[rows, which[:, 1]]))
    assert bool(marked(read, drawn, which).all())
    letter = (drawn.boxes[rows, which[:, 1], 2] - drawn.boxes[rows, which[:, 1], 0]) / 6
    for letters, whole in ((0.4, True), (0.6, False), (-0.6, False)):
        shifted = read.clone()
        shifted[:, 1, 0] += letters * letter
        assert bool((marked(shifted, drawn, which) == whole).all())
    middles = (drawn.boxes[rows[:, None], which, :2] + drawn.boxes[rows[:, None], which, 2:]) / 2
    assert not bool(marked(middles, drawn, which).any())
    misread = marks(pointer, asked, which)[0]
    assert 0.3 < float(marked(misread, drawn, which)[there].float().mean()) < 1
    assert float(marked(seen, drawn, which).float().mean()) < 0.5  # of a pointer that has learnt nothing


def test_routers_give_each_request_to_one_expert() -> None:
    known = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    chosen = by_action(known)
    assert chosen.shape == (16,)
    again = by_action(known.flip(0)).flip(0)
    assert torch.equal(chosen, again)  # a function of the request alone
    assert by_action(torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0.5], [1, 1, 0, 0.9], [1, 0, 0, 0]])).tolist() == [
        2,
        1,
        0,
        0,
    ]
    hits = torch.nn.functional.one_hot(chosen, 3).bool()
    assert torch.equal(fit_router(known, hits)(known).argmax(1), chosen)
    found = mixed(train("v2p", steps=1), 0, n=30)
    assert found["anyone"] >= max(found[name] for name in (*EXPERTS, "routed by action", "routed, trained"))
    assert sum(found["asked"]) == pytest.approx(1)
