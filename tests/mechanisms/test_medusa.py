"""MEDUSA: its limits, one body for all scales, and the pyramid of gates over the image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Place
from workbench.mechanisms.medusa import agreement, gate_pyramid

ROOM, PLACE = mechanisms.get("medusa"), Place(8, 1, 63, causal=False, grid=(7, 9))


def _model(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return ROOM.build(PLACE, **options).double().eval()


X = torch.randn(2, 63, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _backbone(model: torch.nn.Module, x: Tensor) -> Tensor:
    """The model without gates."""
    image, y = x.transpose(1, 2).unflatten(2, (7, 9)), torch.zeros_like(x)
    for s, join in enumerate(model.joins):
        if s:
            image = F.relu(F.conv2d(image, model.stages[s - 1].weight, model.stages[s - 1].bias, stride=2, padding=1))
        made = join(image.movedim(1, -1)).movedim(-1, 1)
        y = y + F.interpolate(made, size=(7, 9), mode="nearest").flatten(2).transpose(1, 2)
    return y


@torch.no_grad()
def test_gates_that_are_open_leave_the_backbone_as_it_is() -> None:
    for mode, bias in (("mul", 800.0), ("residual", -800.0)):
        model = _model(mode=mode)
        assert not torch.allclose(model(X), _backbone(model, X))
        for gate in model.gates:
            gate.head[-1].bias.fill_(bias)
        torch.testing.assert_close(model(X), _backbone(model, X))
    model = _model()
    with workbench.attach(model) as wb:
        with wb.capture():
            model(X)
        with wb.set_gate("gates.0"), wb.set_gate("gates.1"), wb.set_gate("gates.2"):
            torch.testing.assert_close(model(X), _backbone(model, X))


@torch.no_grad()
def test_sites_are_the_scales_and_their_patches() -> None:
    model = _model()
    with workbench.attach(model) as wb:
        with wb.capture() as cap:
            model(X)
        looked = wb.look(X)
    assert [site.name for site in cap.sites] == ["gates.0", "gates.1", "gates.2"]
    assert [cap[site.name].shape[2] for site in cap.sites] == [63, 4 * 5, 2 * 3]
    assert {one.name.split(".")[0] for one in looked.unread} >= {"body", "stages"}
    assert all(((g := cap[site.name].row_sum) > 0).all() and (g < 1).all() for site in cap.sites)


def test_the_body_s_gradient_is_the_sum_over_scales() -> None:
    model = _model()

    def of_body(only: int | None) -> Tensor:
        handles = [
            gate.register_forward_pre_hook(lambda module, args: (args[0], args[1].detach()))
            for s, gate in enumerate(model.gates) if only is not None and s != only
        ]  # fmt: skip
        image = X.transpose(1, 2).unflatten(2, (7, 9))
        made: list[Tensor] = []
        keep = model.body.register_forward_hook(lambda module, args, out: made.append(out))
        loss = (model(X) * torch.arange(8)).sum()
        found = torch.autograd.grad(loss, model.body.leave.weight)[0]
        for handle in (*handles, keep):
            handle.remove()
        assert made[0].shape == (2, 4, *image.shape[2:])
        return found

    # Factors of one scale multiply what later scales see: with the features of each scale as they are, parts add up.
    torch.testing.assert_close(sum(of_body(s) for s in range(3)), of_body(None))


@torch.no_grad()
def test_a_gate_that_is_the_same_everywhere_weighs_channels() -> None:
    model = _model(scales=1, per_channel=True)
    model.gates[0].head[0].weight.zero_()
    factor = model.gates[0].head(torch.zeros(1, 4, 1, 1).double()).sigmoid().flatten()
    torch.testing.assert_close(model(X), model.joins[0](X * factor))


@torch.no_grad()
def test_one_scale_with_one_factor_a_patch_is_spatial_attention() -> None:
    model = _model(scales=1)
    body = model.body(X.mT.unflatten(2, (7, 9)))
    hidden = F.relu(F.conv2d(body, model.gates[0].head[0].weight, model.gates[0].head[0].bias))
    factor = F.conv2d(hidden, model.gates[0].head[2].weight, model.gates[0].head[2].bias).sigmoid()
    assert factor.shape == (2, 1, 7, 9)
    torch.testing.assert_close(model(X), model.joins[0](X * factor.flatten(2).mT))


@torch.no_grad()
def test_a_moved_image_has_moved_gates_at_every_scale() -> None:
    """With circular padding, and by as much as all strides divide; resizing sees the border, up to two patches away."""
    torch.manual_seed(0)
    model = ROOM.build(Place(8, 1, 24 * 32, causal=False, grid=(24, 32))).double().eval()
    for conv in (each for each in model.modules() if isinstance(each, torch.nn.Conv2d)):
        conv.padding_mode = "circular"
    image = torch.randn(1, 8, 24, 32, generator=torch.Generator().manual_seed(3)).double()
    gates = []
    for moved in (image, image.roll((8, 16), (2, 3))):
        with workbench.attach(model) as wb, wb.capture() as cap:
            model(moved.flatten(2).mT)
        gates.append([cap[site.name].row_sum[0, 0] for site in cap.sites])
    for s, (here, there) in enumerate(zip(*gates, strict=True)):
        sides, moved = (24 >> s, 32 >> s), (8 >> s, 16 >> s)
        here, there = here.view(sides).roll(moved, (0, 1)), there.view(sides)
        band = 2 if s == 0 else 1
        rows, columns = (
            [i for i in range(n) if all((i - border + band) % n >= 2 * band for border in (0, by))]
            for n, by in zip(sides, moved, strict=True)
        )
        assert len(rows) >= 2
        assert float(here[rows][:, columns].std()) > 0
        torch.testing.assert_close(there[rows][:, columns], here[rows][:, columns])


@torch.no_grad()
def test_the_pyramid_lies_over_the_image_and_scales_agree_with_themselves() -> None:
    model = _model()
    with workbench.attach(model) as wb, wb.capture() as cap:
        model(X)
    pyramid = gate_pyramid(model, [cap[site.name].pattern.gates for site in cap.sites])
    assert pyramid.shape == (2, 3, 7, 9)
    torch.testing.assert_close(pyramid[:, 0].flatten(1), cap["gates.0"].row_sum[:, 0])
    small = cap["gates.2"].row_sum[:, 0].view(2, 2, 3)
    assert set(pyramid[0, 2].unique().tolist()) == set(small[0].unique().tolist())
    alike = agreement(pyramid)
    torch.testing.assert_close(alike.diagonal(), torch.ones(3).double())
    torch.testing.assert_close(alike, alike.T)
    with pytest.raises(WorkbenchError, match="3 scales, and 1 gates"):
        gate_pyramid(model, [cap[0].pattern.gates])


def test_scales_and_modes_that_cannot_be_are_named() -> None:
    with pytest.raises(WorkbenchError, match="scales=5 of a grid of 7 × 9") as caught:
        ROOM.build(PLACE, scales=5)
    assert "1 to 4" in str(caught.value.hint)
    with pytest.raises(WorkbenchError, match="scales=0"):
        ROOM.build(PLACE, scales=0)
    with pytest.raises(WorkbenchError, match='mode="add" is not known'):
        ROOM.build(PLACE, mode="add")
    with pytest.raises(WorkbenchError, match="width=0"):
        ROOM.build(PLACE, width=0)
