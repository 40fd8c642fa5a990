"""Spiking self-attention: its neurons, its whole numbers, and spikingjelly as the judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.judges import judges, missing
from workbench import WorkbenchError, mechanisms
from workbench.errors import CaptureError
from workbench.kernels.spiking import leaky_fire, spiking_attention, steps_between_spikes
from workbench.mechanisms import Place
from workbench.mechanisms.spikformer import Leaky, Spikformer, SpikingAttention, SpikingStem, flipped

PLACE = Place(16, 2, 15, causal=False)


def _jelly() -> Any:
    try:
        with judges():
            from spikingjelly.activation_based import functional, layer, neuron
            from spikingjelly.activation_based.model import spikformer
    except ImportError as error:
        missing(error)
    return functional, layer, neuron, spikformer


def _layer(place: Place = PLACE, **options: Any) -> SpikingAttention:
    torch.manual_seed(0)
    made = mechanisms.get("spikformer").build(place, **options).double().eval()
    assert isinstance(made, SpikingAttention)
    return made


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _spikes(*shape: int, seed: int = 1) -> Tensor:
    return (_random(*shape, seed=seed) > 0.5).double()


@pytest.mark.parametrize(("current", "period"), [(0.5, None), (1.0, None), (1.1, 4), (1.5, 2), (1.75, 2), (2.0, 1)])
def test_a_constant_current_fires_in_a_period_that_a_formula_gives(current: float, period: int | None) -> None:
    fired = leaky_fire(torch.full((13, 1), current, dtype=torch.float64))
    assert steps_between_spikes(current) == period
    want = [float(period is not None and (t + 1) % period == 0) for t in range(13)]
    assert fired.spikes.flatten().tolist() == want
    since, steps = [], 0
    for spike in want:
        steps += 1
        since.append(current * (1 - 0.5**steps))
        steps = 0 if spike else steps
    torch.testing.assert_close(fired.membrane.flatten(), torch.tensor(since, dtype=torch.float64))
    assert float(leaky_fire(torch.full((1, 1), current)).spikes) == float(current >= 2)  # one step halves it


def test_at_the_first_step_neurons_fire_from_twice_the_threshold_on() -> None:
    current = torch.tensor([[-1.0, 0.5, 1.0, 1.5, 1.99, 2.0, 2.01, 5.0]])
    for threshold in (1.0, 0.5):
        found = leaky_fire(current * threshold, threshold=threshold).spikes[0]
        assert found.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_what_never_fires_has_a_gradient_all_the_same() -> None:
    current = torch.full((4, 3), 0.6, dtype=torch.float64, requires_grad=True)
    fired = leaky_fire(current)
    assert not fired.spikes.any()
    fired.spikes.sum().backward()
    assert current.grad is not None
    assert bool((current.grad > 0).all())
    near = torch.sigmoid(4 * (fired.membrane[-1] - 1))
    torch.testing.assert_close(current.grad[-1], (near * (1 - near) * 4 / 2).detach())


def test_both_orders_of_the_product_are_equal_to_the_last_bit() -> None:
    for n, d in ((5, 9), (9, 5)):
        q, k, v = (_spikes(3, 2, n, d, seed=seed).float() for seed in range(3))
        z = spiking_attention(q, k, v)
        assert torch.equal(z, (q @ k.mT * 0.125) @ v)
        assert torch.equal(z, q @ (k.mT @ v) * 0.125)
    ones = torch.ones(1, 2, 7, 8)
    assert bool((spiking_attention(ones, ones, ones) == 0.125 * 8 * 7).all())
    k = _spikes(1, 2, 7, 8)
    pattern = spiking_attention.pattern_of(k, k * (torch.arange(7) != 3)[:, None], k)  # type: ignore[attr-defined]
    dense = pattern.dense()
    assert not dense[..., 3].any()
    assert torch.equal(dense / 0.125, (dense / 0.125).round())
    assert 0 <= float(dense.min()) <= float(dense.max()) <= 0.125 * 8
    assert not pattern.normalised
    assert not pattern.signed
    silent = spiking_attention.pattern_of(torch.zeros_like(k), k, k)  # type: ignore[attr-defined]
    assert not silent.dense().any()
    assert bool(silent.statistics(["entropy"])["entropy"].isnan().all())


@torch.no_grad()
def test_tokens_have_no_order_and_spikes_are_spikes() -> None:
    layer, x = _layer(), _random(2, 15, 16)
    turned = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    y = layer(x)
    torch.testing.assert_close(layer(x[:, turned]), y[:, turned])
    assert torch.equal(y * 4, (y * 4).round())  # a rate over four steps
    assert bool(y.any())
    for spikes in layer.heads(x):
        assert spikes.shape == (8, 2, 15, 8)
        assert torch.equal(spikes, spikes.bool().double())
        assert 0 < float(spikes.mean()) < 1
    given = x[:, None].expand(-1, 4, -1, -1)
    assert torch.equal(layer(given).mean(1), y)  # the same image at every step
    with workbench.attach(layer) as wb, wb.capture([]) as cap:
        layer(x)
    q, k, _ = layer.heads(x)
    assert cap[0].site.windows == 4
    assert torch.equal(cap[0].pattern.dense(), 0.125 * (q @ k.mT))


@torch.no_grad()
def test_a_model_of_blocks_passes_whole_numbers_on() -> None:
    torch.manual_seed(0)
    model = Spikformer(Place(16, 2, 12, causal=False, grid=(3, 4)), n_classes=5, steps=3).eval()
    images, seen = 3 * torch.randn(2, 3, 12, 16), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with workbench.attach(model) as wb:
        report = wb.verify(images)
        assert report.ok, report.table
        assert [(site.kind, site.windows, site.n_heads) for site in wb.sites] == [("self", 3, 2)] * 2
        seen.clear()
        bare = model(images)
        with wb.capture(["entropy", "received"]) as cap:
            assert torch.equal(model(images), bare)
        assert cap[1].pattern.shape == (6, 2, 12, 12)
    for at, given in enumerate(seen[:2]):
        assert torch.equal(given, given.round())
        assert 0 <= float(given.min()) <= float(given.max()) <= 2 + 2 * at  # the stem adds once, a block twice
    with pytest.raises(WorkbenchError, match="these images make 2 × 4 patches, and not 3 × 4"):
        model(images[:, :, :8])


@torch.no_grad()
def test_one_spike_that_is_turned_over_moves_later_steps_alone() -> None:
    layer, x = _layer(), _random(1, 4, 15, 16)
    before = layer(x)
    with flipped(layer.gives, (0, 1, 3, slice(None))):
        after = layer(x)
    changed = (after != before)[0].flatten(1).any(1)
    assert not changed[0]
    assert bool(changed[1:].any())
    assert torch.equal(layer(x), before)


@torch.no_grad()
def test_our_neurons_and_attention_are_spikingjelly_s() -> None:
    functional, layers, neuron, _ = _jelly()
    current = 2 * _random(9, 5)
    for threshold in (1.0, 0.5):
        node = neuron.LIFNode(tau=2.0, v_threshold=threshold, detach_reset=True, step_mode="m")
        assert torch.equal(leaky_fire(current, threshold=threshold).spikes, node(current))
    torch.manual_seed(0)
    judge, ours, d = layers.SpikingSelfAttention(16, num_heads=2).double().eval(), _layer(), 16
    conv, norm = judge.qkv_conv_bn
    for i, (project, each) in enumerate((ours.q, ours.k, ours.v)):
        part = slice(i * d, (i + 1) * d)
        conv.weight[part] *= 6  # hard enough that neurons fire
        project.weight.copy_(conv.weight[part, :, 0])
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name)[part] += 0.1 * torch.rand(d, dtype=torch.float64)
            getattr(each, name).copy_(getattr(norm, name)[part])
    for each, theirs in ((ours.q[1], slice(0, d)), (ours.k[1], slice(d, 2 * d)), (ours.v[1], slice(2 * d, None))):
        norm.bias[theirs] += 1
        each.bias.copy_(norm.bias[theirs])
    conv, norm = judge.proj_conv_bn
    norm.bias += 1
    conv.weight *= 6
    ours.out.weight.copy_(conv.weight[..., 0])
    ours.out_norm.load_state_dict(norm.state_dict())
    x = _random(2, 3, 15, 16)  # [batch, step, token, channel]
    want = judge(x.permute(1, 0, 3, 2))
    assert 0.02 < float(want.mean()) < 0.98
    assert torch.equal(ours(x), want.permute(1, 0, 3, 2))
    functional.reset_net(judge)


class _Reset(nn.Module):
    """Neurons begin at rest in every forward."""

    def __init__(self, model: nn.Module, reset: Any) -> None:
        super().__init__()
        self.model, self.reset = model, reset

    def forward(self, x: Tensor) -> Tensor:
        self.reset(self.model)
        y: Tensor = self.model(x)
        return y


@torch.no_grad()
def test_spikingjelly_s_spiking_transformer_is_read() -> None:
    functional, _, _, models = _jelly()
    torch.manual_seed(0)
    model = models.Spikformer(T=3, img_size_h=48, img_size_w=64, embed_dims=32, num_heads=4, depths=2, num_classes=5)
    for weight in model.parameters():
        if weight.dim() > 2:
            weight.normal_(std=(3 / weight[0].numel()) ** 0.5)
        elif not weight.any():
            weight.fill_(1.0)  # offsets, as high as the threshold
    whole = _Reset(model.eval(), functional.reset_net)
    images = torch.randn(2, 3, 48, 64)
    with workbench.attach(whole) as wb:
        with wb.capture(["received"], z=True, values=True) as cap:
            bare = whole(images)
        assert torch.equal(whole(images), bare)
        assert [(site.kind, site.windows, site.n_heads) for site in wb.sites] == [("self", 3, 4)] * 2
        for site in wb.sites:
            found = cap[site.name]
            assert found.pattern.shape == (6, 4, 12, 12)
            assert torch.equal(found.pattern.apply(found.pattern.values), found.z.transpose(1, 2))
            dense = found.pattern.dense() / 0.125
            assert torch.equal(dense, dense.round())
            assert bool(dense.any())
        report = wb.verify(images)
        assert report.ok, report.table
        with wb.ablate((0, 1)):
            assert not torch.equal(whole(images), bare)
        functional.reset_net(model)
    with workbench.attach(model) as wb:
        with wb.capture([]) as cap:
            model(images)
        assert len(cap.sites) == 2
        with pytest.raises(CaptureError, match="potentials of an earlier forward"), wb.capture([]):
            model(images)  # its neurons are as the forward before has left them


@pytest.mark.parametrize("kind", ["token", "channel"])
@torch.no_grad()
def test_spikingjelly_s_query_gates_are_read(kind: str) -> None:
    functional, layer, _, _ = _jelly()
    torch.manual_seed(0)
    inner = layer.attention.QKAttention(12, num_heads=3, qka_type=kind)
    for weight in inner.parameters():
        weight.normal_(std=1.0) if weight.dim() > 2 else weight.fill_(1.0)
    model = _Reset(inner.eval(), functional.reset_net)
    spikes = (torch.rand(4, 2, 12, 10) < 0.5).float()
    with workbench.attach(model) as wb:
        with wb.capture() as cap:
            bare = model(spikes)
        assert torch.equal(model(spikes), bare)
        (site,) = cap.sites
        pattern = cap[site.name].pattern
        over = ("position", "channel") if kind == "token" else ("channel",)
        assert (site.kind, pattern.shape[0], pattern.over) == ("gate", 8, over)
        assert site.n_heads == (3 if kind == "token" else 12)
        assert set(pattern.gates.unique().tolist()) == {0.0, 1.0}
        report = wb.verify(spikes)
        assert report.ok, report.table
        with wb.set_gate(site.name, to=0.0):
            closed = model(spikes)
        assert not torch.equal(closed, bare)
        assert torch.equal(closed[:, :, :, :1].expand_as(closed), closed)  # of offsets alone: no token differs
    functional.reset_net(inner)
    with workbench.attach(inner) as wb:
        with wb.capture([]):
            inner(spikes)
        with pytest.raises(CaptureError, match="potentials of an earlier forward"), wb.capture([]):
            inner(spikes)


def test_options_that_it_cannot_take_are_named() -> None:
    with pytest.raises(WorkbenchError, match="steps=0"):
        _layer(steps=0)
    with pytest.raises(WorkbenchError, match="scale=0 is not above zero"):
        _layer(scale=0)
    with pytest.raises(WorkbenchError, match=r"x must be \[batch, 1 to 15 tokens, 16\]"):
        _layer()(torch.zeros(2, 4, 16, 16, dtype=torch.float64))
    with pytest.raises(WorkbenchError, match="d_model=6 cannot be halved 2 times"):
        SpikingStem(6, halvings=3)
    with pytest.raises(CaptureError, match=r"tau=0\.5 is below 1"):
        leaky_fire(torch.zeros(2, 1), tau=0.5)
    with pytest.raises(CaptureError, match="of at least one step"):
        leaky_fire(torch.zeros(0, 1))
    with pytest.raises(CaptureError, match="threshold is a finite number above 0"):
        Leaky(threshold=-1.0)(torch.zeros(1, 2, 3))
