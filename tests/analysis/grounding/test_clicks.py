"""Labels, losses, regions and clicks of V2P, against what is known of them without a computer."""

import math

import pytest
import torch
from torch import Tensor

from workbench.analysis.grounding.clicks import click, click_labels, click_losses, hits, regions
from workbench.errors import WorkbenchError


def patches(rows: int, columns: int, edge: float) -> tuple[Tensor, Tensor]:
    """Boxes and cells of a grid of squares."""
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    corner = cells.flip(-1).double() * edge
    return torch.cat([corner, corner + edge], 1), cells


@pytest.mark.parametrize(("factor", "total"), [(1, 0.14663), (2, 0.46606), (4.1325, 0.92390), (6, 0.99461)])
@pytest.mark.parametrize(("edge", "box"), [(7.0, (3.0, 8.0, 40.0, 21.0)), (2.5, (20.0, 20.0, 22.0, 23.0))])
def test_labels_sum_to_the_same_on_every_grid(
    factor: float, total: float, edge: float, box: tuple[float, float, float, float]
) -> None:
    labels = click_labels(box, patches(20, 30, edge)[0], factor)
    assert float(labels.sum()) == pytest.approx((math.erf(factor / 2 / math.sqrt(2))) ** 2, rel=1e-9)
    assert float(labels.sum()) == pytest.approx(total, abs=1e-5)


def test_labels_have_the_symmetry_of_the_box_and_their_peak_in_its_middle() -> None:
    boxes, _ = patches(9, 9, 4)
    labels = click_labels((8, 8, 28, 28), boxes).view(9, 9)
    torch.testing.assert_close(labels, labels.T)
    torch.testing.assert_close(labels, labels.flip(0))
    assert int(labels.argmax()) == 4 * 9 + 4
    assert (labels[:2] == 0).all()


def test_labels_between_even_and_one_patch() -> None:
    boxes, _ = patches(6, 6, 5)
    even = click_labels((3, 4, 18, 21), boxes, 1e-4)
    wide = (boxes[:, 2].clamp(max=18) - boxes[:, 0].clamp(min=3)).clamp(min=0)
    high = (boxes[:, 3].clamp(max=21) - boxes[:, 1].clamp(min=4)).clamp(min=0)
    torch.testing.assert_close(even / even.sum(), wide * high / (15 * 17), atol=1e-6, rtol=1e-4)
    one = click_labels((3, 4, 18, 21), boxes, 1e4)
    assert float(one.max()) == pytest.approx(1)
    assert int(one.argmax()) == 2 * 6 + 2  # around (10.5, 12.5)
    assert float(one.sum()) == pytest.approx(1)


def test_both_losses_share_their_optimum_and_have_the_gradient_of_the_formula() -> None:
    boxes, _ = patches(5, 5, 4)
    labels = click_labels((4, 4, 12, 16), boxes)[None]
    kl, background = click_losses(labels / labels.sum(), labels)
    assert float(kl) == pytest.approx(0, abs=1e-7)
    assert float(background) == 0
    even = torch.full((1, 25), 1 / 25, dtype=torch.float64)
    assert float(click_losses(even, labels)[1]) == pytest.approx(1 - 6 / 25)
    logits = torch.randn(1, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    alpha = logits.softmax(-1)
    loss = click_losses(alpha, labels)[1]
    loss.backward()
    torch.testing.assert_close(logits.grad, (alpha * ((labels == 0).double() - loss)).detach())


def test_the_brighter_of_two_regions_is_clicked() -> None:
    boxes, cells = patches(6, 8, 10)
    weights = torch.zeros(6, 8)
    weights[1, 1:3] = torch.tensor([0.2, 0.1])
    weights[4, 5], weights[4, 6], weights[5, 7] = 0.15, 0.25, 0.2  # corners do not touch
    found = regions(weights.flatten(), cells)
    assert [one.tolist() for one in found] == [[37, 38], [9, 10], [47]]
    x, y = click(weights.flatten(), boxes, cells)
    assert (x, y) == pytest.approx(((0.15 * 55 + 0.25 * 65) / 0.4, 45))
    assert hits((x, y), (60, 40, 70, 50))
    assert not hits((x, y), (62, 40, 70, 50))


def test_regions_do_not_reach_from_tile_to_tile() -> None:
    cells = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 2]])
    assert [one.tolist() for one in regions(torch.tensor([0.3, 0.3, 0.4]), cells)] == [[2], [0, 1]]


def test_what_has_no_label_or_click_is_refused() -> None:
    boxes, cells = patches(2, 2, 4)
    with pytest.raises(WorkbenchError, match="give no label"):
        click_labels((3, 3, 3, 5), boxes)
    with pytest.raises(WorkbenchError, match="nothing points anywhere"):
        click(torch.zeros(4), boxes, cells)
    with pytest.raises(WorkbenchError, match="a weight for each cell"):
        regions(torch.zeros(3), cells)
