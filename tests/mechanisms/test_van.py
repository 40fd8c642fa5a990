"""Large-kernel attention: its limits, its two maps, its reach, and that the product is of second degree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import workbench
from support.released import filled, read_alone
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
def test_inside_the_image_both_convolutions_are_the_one_kernel_and_the_near_one_alone_is_of_five() -> None:
    layer, x = _layer(), _input()
    u = F.gelu(layer.enter(x)).mT.unflatten(2, (27, 25))
    layer.near.bias.zero_()
    layer.far.bias.zero_()
    both, one = layer.far(layer.near(u)), F.conv2d(u, layer.kernel()[:, None], padding=11, groups=3)
    torch.testing.assert_close(one[..., 9:-9, 9:-9], both[..., 9:-9, 9:-9])
    assert not torch.allclose(one[..., 8:-8, 8:-8], both[..., 8:-8, 8:-8])  # nearer, it pads what is between them
    layer.far.weight.zero_()
    layer.far.weight[:, :, 3, 3] = 1
    seen = (layer.kernel() != 0).any(0).nonzero()
    assert (seen.amin(0).tolist(), seen.amax(0).tolist()) == ([9, 9], [13, 13])


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


# What the released attention of two channels gives in float64 for the weights and the image of `_filled`.
RELEASED = [
    1.0468953, -0.2911298, -1.6767721, 0.2459757, 0.9187559, -0.8881845, -1.3265947, 0.7891549, 0.5229788, -1.6309764,
    -0.5884848, 1.0389919, -0.1556983, -1.8899917, 0.0129517, 0.9837352, -0.7749309, -1.3010066, 0.6628148, 0.6571529,
    -0.9829138, -0.4647546, 1.0215291, 0.1019442, -1.1236507, 0.0855411, 1.0179008, -0.387171, -0.9192387, 0.6577961,
    0.7925087, -0.8651391, -0.5125686, 0.955607, 0.2597906, -1.1146897, -0.0663751, 1.1655399, -0.3044985, -1.0749969,
]  # fmt: skip


class LKA(nn.Module):
    """With the names of the released one's parts, and its equations."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(d, d, 5, padding=2, groups=d)
        self.conv_spatial = nn.Conv2d(d, d, 7, padding=9, groups=d, dilation=3)
        self.conv1 = nn.Conv2d(d, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x.clone() * self.conv1(self.conv_spatial(self.conv0(x)))


class Attention(nn.Module):
    """Likewise, the block around it."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.proj_1, self.spatial_gating_unit, self.proj_2 = nn.Conv2d(d, d, 1), LKA(d), nn.Conv2d(d, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x)))) + x


def _filled() -> tuple[Attention, Tensor]:
    return filled(Attention(2)), torch.cos(torch.arange(40, dtype=torch.float64) * 1.7).view(1, 2, 4, 5)


@torch.no_grad()
def test_it_is_the_released_attention_and_that_is_read() -> None:
    want = torch.tensor(RELEASED, dtype=torch.float64).view(1, 2, 20)
    released, image = _filled()
    torch.testing.assert_close(released(image).flatten(2), want, atol=1e-6, rtol=0)
    ours, x = _layer(Place(2, 1, 20, causal=False, grid=(4, 5))), image.flatten(2).mT
    unit = released.spatial_gating_unit
    pairs = ((ours.near, unit.conv0), (ours.far, unit.conv_spatial), (ours.point, unit.conv1))
    for mine, theirs in (*pairs, (ours.enter, released.proj_1), (ours.out, released.proj_2)):
        mine.weight.copy_(theirs.weight.view_as(mine.weight))
        mine.bias.copy_(theirs.bias)
    torch.testing.assert_close(ours(x).mT, want, atol=1e-6, rtol=0)
    found = [read_alone(module, given, "gate") for module, given in ((ours, x), (released, image))]
    torch.testing.assert_close(*[(site.pattern.gates, site.patterns["source"].dense()) for site in found])
