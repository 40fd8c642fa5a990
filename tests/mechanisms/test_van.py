"""Large-kernel attention: its limits, its two maps, its reach, and that the product is of second degree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Place

ROOM = mechanisms.get("van")
PLACE = Place(3, 1, 27 * 25, causal=False, grid=(27, 25))


def _layer(place: Place = PLACE, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return ROOM.build(place, **options).double().eval()


def _input(place: Place = PLACE) -> Tensor:
    return torch.randn(2, place.length, place.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _bias_free(layer: torch.nn.Module) -> torch.nn.Module:
    for part in (layer.near, layer.far, layer.point):
        torch.nn.init.zeros_(part.bias)
    return layer


@torch.no_grad()
def test_the_gate_is_that_of_the_equation() -> None:
    layer, x = _layer(), _input()
    u = F.gelu(x @ layer.enter.weight.T + layer.enter.bias)
    image = u.transpose(1, 2).unflatten(2, (27, 25))
    near = F.conv2d(image, layer.near.weight, layer.near.bias, padding=2, groups=3)
    far = F.conv2d(near, layer.far.weight, layer.far.bias, padding=9, dilation=3, groups=3)
    g = torch.einsum("bchw,dc->bdhw", far, layer.point.weight[:, :, 0, 0]) + layer.point.bias[:, None, None]
    y = (u * g.flatten(2).transpose(1, 2)) @ layer.out.weight.T + layer.out.bias + x
    torch.testing.assert_close(layer(x), y)


@torch.no_grad()
def test_both_maps_add_up_to_what_they_are_of() -> None:
    place = Place(4, 1, 63, causal=False, grid=(7, 9))
    layer, x = _bias_free(_layer(place)), _input(place)
    u, g = layer.parts(x, x)
    torch.testing.assert_close(layer.source_map(x, x).dense().sum(-1), g.transpose(1, 2))
    additive = layer.additive(x)
    torch.testing.assert_close(additive.dense().sum(-1), (u * g).transpose(1, 2))
    torch.testing.assert_close(additive.total, (u * g).transpose(1, 2))
    with workbench.attach(layer) as wb, wb.capture() as cap:
        layer(x)
    torch.testing.assert_close(cap[0].patterns["source"].dense(), layer.source_map(x, x).dense())
    assert cap[0].patterns["source"].grade == additive.grade == "frozen"


def test_the_product_is_of_second_degree_in_u() -> None:
    place = Place(4, 1, 35, causal=False, grid=(5, 7))
    layer, u = _bias_free(_layer(place)), torch.randn(1, 35, 4).double()

    def product(u: Tensor) -> Tensor:
        image = u.transpose(1, 2).unflatten(2, (5, 7))
        return u * layer.point(layer.far(layer.near(image))).flatten(2).transpose(1, 2)

    torch.testing.assert_close(product(2 * u), 4 * product(u))
    _, along = torch.autograd.functional.jvp(product, u, u)
    torch.testing.assert_close(along, 2 * product(u))  # Euler: the additive map is half of the derivative


@torch.no_grad()
def test_its_limits_are_the_square_and_the_identity() -> None:
    layer, x = _bias_free(_layer(shortcut=False)), _input()
    for conv in (layer.near, layer.far):
        conv.weight.zero_()
        conv.weight[:, :, conv.weight.shape[2] // 2, conv.weight.shape[3] // 2] = 1
    layer.point.weight.copy_(torch.eye(3)[:, :, None, None])
    layer.out.weight.copy_(torch.eye(3))
    layer.out.bias.zero_()
    u = F.gelu(layer.enter(x))
    torch.testing.assert_close(layer(x), u.square())
    layer.point.weight.zero_()
    layer.point.bias.fill_(1)
    torch.testing.assert_close(layer(x), u)


@torch.no_grad()
def test_a_patch_reaches_eleven_others_on_each_side_and_no_more() -> None:
    layer, x = _layer(), _input()
    layer.point.weight.copy_(torch.eye(3)[:, :, None, None])
    other = x.clone()
    other[:, 13 * 25 + 12] += 1  # the middle
    changed = (layer.parts(other, other)[1] != layer.parts(x, x)[1]).any(-1)[0].view(27, 25)
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 24, 1, 23)
    assert layer.kernel().shape == (3, 23, 23)
    assert int(changed.sum()) == int((layer.kernel() != 0).any(0).sum()) == 529
    small = _layer(kernel=7, dilation=1)
    assert small.kernel().shape == (3, 7, 7)


@torch.no_grad()
def test_moved_images_have_moved_gates_inside() -> None:
    layer = _layer()
    image = torch.randn(1, 27, 25, 3, generator=torch.Generator().manual_seed(1)).double()
    here, there = (layer.parts(t.flatten(1, 2), t.flatten(1, 2))[1] for t in (image, image.roll((1, 1), (1, 2))))
    here, there = (t.unflatten(1, (27, 25)) for t in (here, there))
    torch.testing.assert_close(here[:, 11:15, 11:13], there[:, 12:16, 12:14])  # as far as no edge is seen
    assert not torch.allclose(here[:, 10:15, 11:13], there[:, 11:16, 12:14])


def test_it_has_as_many_weights_as_the_paper_says() -> None:
    layer = ROOM.build(Place(32, 1, 4, causal=False, grid=(2, 2)))
    assert sum(conv.weight.numel() for conv in (layer.near, layer.far, layer.point)) == 74 * 32 + 32**2 == 3392


def test_kernels_without_a_middle_are_named() -> None:
    with pytest.raises(WorkbenchError, match="kernel=10 with dilation=3 has a dilated part of 4") as caught:
        ROOM.build(PLACE, kernel=10)
    assert "kernel=9 or kernel=15" in str(caught.value.hint)
    with pytest.raises(WorkbenchError, match="kernel=0"):
        ROOM.build(PLACE, kernel=0)
    with pytest.raises(WorkbenchError, match="dilation=0"):
        ROOM.build(PLACE, dilation=0)
