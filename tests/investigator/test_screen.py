"""Agent S2's grounding: which expert an action goes to, and where on the screen it ends."""

import pytest
import torch

from workbench import WorkbenchError
from workbench.investigator.screen import EXPERTS, ROUTES, rescale, route


def test_every_action_goes_to_one_expert_that_its_name_alone_decides() -> None:
    found = route([*ROUTES, *reversed(ROUTES)])
    assert torch.equal(found.sum(1), torch.ones(2 * len(ROUTES)))
    assert torch.equal(found[: len(ROUTES)], found[len(ROUTES) :].flip(0))
    assert {EXPERTS[i] for i in found.argmax(1).tolist()} == set(EXPERTS)
    assert EXPERTS[int(route(["highlight_text_span"]).argmax())] == "textual"
    assert EXPERTS[int(route(["set_cell_values"]).argmax())] == "structural"
    assert route([]).shape == (0, 4)


def test_points_are_scaled_each_way_by_itself() -> None:
    assert rescale((0, 0), (1000, 500), (1920, 1080)) == (0, 0)
    assert rescale((1000, 500), (1000, 500), (1920, 1080)) == (1920, 1080)
    (x, y), (a, b) = rescale((300, 100), (1000, 500), (1920, 1080)), rescale((600, 200), (1000, 500), (1920, 1080))
    assert (a, b) == pytest.approx((2 * x, 2 * y))


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(WorkbenchError, match=r"no action 'clik'[\s\S]*click"):
        route(["clik"])
    with pytest.raises(WorkbenchError, match="neither may be empty"):
        rescale((1, 1), (0, 5), (10, 10))
    with pytest.raises(WorkbenchError, match="outside"):
        rescale((11, 1), (10, 10), (100, 100))
