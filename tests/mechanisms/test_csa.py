"""Class semantics-based attention: its limits, what its gates are made of, and which classes opened them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Place

ROOM, PLACE = mechanisms.get("csa"), Place(8, 1, 15, causal=False)


def _layer(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return ROOM.build(PLACE, n_classes=5, **options).double().eval()


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, R = _random(2, 15, 8), _random(2, 15, 5, seed=2)


@torch.no_grad()
def test_gates_of_one_half_leave_the_features_as_they_are() -> None:
    layer = _layer()
    for last in (layer.channel.excite, layer.time.second):
        last.weight.zero_()
        last.bias.zero_()
    torch.testing.assert_close(layer(X, R), X)
    with workbench.attach(layer) as wb, wb.capture() as cap:
        layer(X, R)
    assert [tuple(cap[site.name].pattern.over) for site in cap.sites] == [("channel",), ("position",)]
    assert all(bool((cap[site.name].row_sum == 0.5).all()) for site in cap.sites)


@torch.no_grad()
def test_the_channel_path_of_the_features_mean_is_squeeze_and_excitation() -> None:
    torch.manual_seed(0)
    layer = ROOM.build(PLACE, summary="mean").double().eval()
    down, up = layer.channel.squeeze, layer.channel.excite
    factor = (F.relu(X.mean(1) @ down.weight.T + down.bias) @ up.weight.T + up.bias).sigmoid()
    with workbench.attach(layer) as wb:
        with wb.capture():
            layer(X)
        with wb.set_gate("time", to=0.0):
            torch.testing.assert_close(layer(X), X * factor[:, None])


@torch.no_grad()
def test_the_channel_gate_knows_no_order_and_the_time_gate_only_what_is_near() -> None:
    layer, order = _layer(), torch.randperm(15, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer.channel.logits(R[:, order]), layer.channel.logits(R))
    assert not torch.allclose(layer.time.logits(R[:, order]), layer.time.logits(R)[:, order])
    moved = layer.time.logits(R.roll(1, 1))
    torch.testing.assert_close(moved[:, 4:-3], layer.time.logits(R)[:, 3:-4])


@pytest.mark.parametrize("per_channel", [False, True])
def test_what_times_add_to_the_time_gate_is_its_gradient_times_the_classes(per_channel: bool) -> None:
    layer = _layer(kernel=5, per_channel=per_channel)
    source = layer.time.source_map(X, R)
    found = torch.autograd.functional.jacobian(layer.time.logits, R)  # [batch, time, head, batch, time, class]
    want = torch.stack([(found[b, :, :, b] * R[b]).sum(-1) for b in range(2)]).transpose(1, 2)
    torch.testing.assert_close(source.dense(), want)
    i = torch.arange(15)
    assert torch.equal((source.dense() != 0).any(0).any(0), (i[:, None] - i).abs() <= 4)  # two kernels of five
    assert source.n_heads == (8 if per_channel else 1)


def test_gates_do_not_depend_on_the_features() -> None:
    layer, x, r = _layer(), X.clone().requires_grad_(), R.clone().requires_grad_()
    gates = layer.channel.parts(x, r)[1].sum() + layer.time.parts(x, r)[1].sum()
    assert torch.autograd.grad(gates, x, allow_unused=True, retain_graph=True)[0] is None
    (of_classes,) = torch.autograd.grad(gates, r)
    assert of_classes.any()


def test_where_classes_make_the_features_gradients_reach_them_by_both() -> None:
    """R is turned into F by an encoder: what reaches R is what comes through the gates and what comes through F."""
    torch.manual_seed(0)
    layer, encode, r = ROOM.build(PLACE, n_classes=5).double().eval(), torch.nn.Linear(5, 8).double(), R.clone()
    r.requires_grad_()

    def reached(features: Tensor, classes: Tensor) -> Tensor:
        return torch.autograd.grad((layer(features, classes) * X).sum(), r)[0]

    gates, features = reached(encode(r).detach(), r), reached(encode(r), r.detach())
    assert gates.any()
    assert features.any()
    torch.testing.assert_close(reached(encode(r), r), gates + features)


@torch.no_grad()
def test_examples_may_have_each_other_s_gates() -> None:
    layer = _layer()
    gates = layer.channel.parts(X, R)[1] + layer.time.parts(X, R)[1]
    torch.testing.assert_close(layer(X, R.flip(0)), X * gates.flip(0))
    joined = _layer(fusion="join")
    both = torch.cat((X * joined.channel.parts(X, R)[1], X * joined.time.parts(X, R)[1]), dim=-1)
    torch.testing.assert_close(joined(X, R), both @ joined.fuse.weight.T + joined.fuse.bias)


def test_classes_that_opened_the_gates_account_for_what_is_linear_in_them() -> None:
    layer = _layer(summary="mean")
    channel, time = layer.opened_by(R)
    assert (channel.shape, time.shape) == ((2, 8, 5), (2, 15, 5))
    torch.testing.assert_close(time.sum(-1), layer.time.source_map(X, R).total[:, 0])
    down, up = layer.channel.squeeze, layer.channel.excite
    hidden = R.mean(1) @ down.weight.T + down.bias
    want = torch.einsum("ch,bh,hr,br->bcr", up.weight, (hidden > 0).double(), down.weight, R.mean(1))
    torch.testing.assert_close(channel, want)


def test_bad_options_and_classes_are_named() -> None:
    with pytest.raises(WorkbenchError, match="kernel=4 has no middle"):
        _layer(kernel=4)
    with pytest.raises(WorkbenchError, match='fusion="add" is not known') as caught:
        _layer(fusion="add")
    assert '"sum" or "join"' in str(caught.value.hint)
    with pytest.raises(WorkbenchError, match='summary="max" is not known'):
        _layer(summary="max")
    with pytest.raises(WorkbenchError, match="n_classes=0"):
        ROOM.build(PLACE, n_classes=0)
    with pytest.raises(WorkbenchError, match=r"classes must be \[2, 15, 5\]"):
        _layer()(X, R[:, :7])
    with pytest.raises(WorkbenchError, match=r"classes must be \[2, 15, 5\]"):
        _layer()(X)
