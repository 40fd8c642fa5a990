"""NiNformer's gate: its limits, the mixing that makes it, and how much it depends on the order of tokens."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import workbench
from support.released import filled, read_alone
from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Place

ROOM, PLACE = mechanisms.get("ninformer"), Place(6, 1, 9, causal=False)


def _layer(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return ROOM.build(PLACE, **options).double().eval()


X = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _mixer(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """An MLP-Mixer block, written out."""
    first, second = layer.token.first, layer.token.second
    z = F.layer_norm(x, (6,), layer.token_norm.weight, layer.token_norm.bias)
    hidden = F.gelu(torch.einsum("bnd,mn->bmd", z, first.weight) + first.bias[:, None])
    m = x + torch.einsum("bmd,nm->bnd", hidden, second.weight) + second.bias[:, None]
    z = F.layer_norm(m, (6,), layer.channel_norm.weight, layer.channel_norm.bias)
    up, _, down = layer.channel
    return m + F.gelu(z @ up.weight.T + up.bias) @ down.weight.T + down.bias


@torch.no_grad()
def test_it_is_a_linear_layer_times_a_mixer_block() -> None:
    layer = _layer()
    torch.testing.assert_close(layer(X), (X @ layer.value.weight.T + layer.value.bias) * _mixer(layer, X))
    layer.value.weight.zero_()
    layer.value.bias.fill_(1)
    torch.testing.assert_close(layer(X), _mixer(layer, X))


@torch.no_grad()
def test_what_tokens_add_is_the_token_mlp_at_its_own_slopes() -> None:
    layer = _layer()
    z = layer.token_norm(X).transpose(1, 2)
    h = layer.token.first(z)
    slopes, (w1, w2) = 0.5 * (1 + torch.erf(h / 2**0.5)), (layer.token.first.weight, layer.token.second.weight)
    source = layer.source_map(X, X)
    maps = torch.einsum("im,bdm,mj->bdij", w2, slopes, w1)
    torch.testing.assert_close(source.base.dense(), maps)
    torch.testing.assert_close(source.dense(), maps * z[:, :, None])
    biases = (slopes * layer.token.first.bias) @ w2.T + layer.token.second.bias
    torch.testing.assert_close(source.total + biases, layer.token(layer.token_norm(X)).transpose(1, 2))
    with workbench.attach(layer) as wb, wb.capture() as cap:
        layer(X)
    torch.testing.assert_close(cap[0].patterns["source"].dense(), source.dense())
    torch.testing.assert_close(cap[0].pattern.gates, _mixer(layer, X).transpose(1, 2))


def test_without_the_token_mlp_nothing_passes_between_tokens() -> None:
    layer = _layer()

    def reached() -> Tensor:
        found = torch.autograd.functional.jacobian(lambda x: layer(x).sum((0, 2)), X)  # [token, batch, token, channel]
        return found.abs().amax((1, 3)) > 0

    assert reached().all()
    torch.nn.init.zeros_(layer.token.second.weight)
    assert torch.equal(reached(), torch.eye(9, dtype=torch.bool))


@torch.no_grad()
def test_a_gate_held_at_one_is_a_linear_layer_of_each_token() -> None:
    layer = _layer()
    with workbench.attach(layer) as wb:
        with wb.capture():
            layer(X)
        with wb.set_gate(wb.sites[0], to=1.0):
            torch.testing.assert_close(layer(X), layer.value(X))


@torch.no_grad()
def test_tokens_in_another_order_are_other_tokens_unless_its_weights_are_too() -> None:
    layer, order = _layer(), torch.randperm(9, generator=torch.Generator().manual_seed(2))
    before = layer(X)
    assert not torch.allclose(layer(X[:, order]), before[:, order])
    layer.token.first.weight.copy_(layer.token.first.weight[:, order])
    layer.token.second.weight.copy_(layer.token.second.weight[order])
    layer.token.second.bias.copy_(layer.token.second.bias[order])
    torch.testing.assert_close(layer(X[:, order]), before[:, order])


@torch.no_grad()
def test_the_output_is_linear_in_what_is_multiplied_and_in_the_factor() -> None:
    layer, other = _layer(), X.flip(0)
    u, g = layer.parts(X, X)
    more, apart = layer.parts(other, other)
    torch.testing.assert_close(layer(X, other), u * apart)  # what is multiplied of one, the factor of another
    torch.testing.assert_close(layer(other, X), more * g)
    layer.value.weight.mul_(3)
    layer.value.bias.mul_(3)
    torch.testing.assert_close(layer(X), 3 * u * g)
    with workbench.attach(layer) as wb:
        with wb.capture():
            layer(X)
        with wb.set_gate(wb.sites[0], to=lambda g, site, head: 2 * g + 1):
            torch.testing.assert_close(layer(X), 2 * 3 * u * g + 3 * u)


def test_other_lengths_and_widths_are_named() -> None:
    with pytest.raises(WorkbenchError, match=r"x must be \[batch, 9 tokens, 6\]") as caught:
        _layer()(X[:, :5])
    assert caught.value.shape == (2, 5, 6)
    with pytest.raises(WorkbenchError, match="hidden=0"):
        ROOM.build(PLACE, hidden=0)


# What the released unit for four tokens of three channels gives in float64 for the weights and the input of `_filled`.
RELEASED = [
    0.1280563, 0.4953728, 0.8494996, -0.2374391, -0.1512136, 0.3858999,
    -0.4931337, -0.3994765, -0.7631039, 0.1992552, -0.5763393, 1.634725,
]  # fmt: skip


def _mlp(d: int) -> nn.Module:
    """With the names of the released one's parts."""
    layers = nn.Linear(d, 5), nn.GELU(), nn.Dropout(0.5), nn.Linear(5, d), nn.Dropout(0.5)
    return nn.Sequential(OrderedDict(net=nn.Sequential(*layers)))


class Turn(nn.Module):
    """[batch, a, b] to [batch, b, a]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class MixerBlock(nn.Module):
    """With the names of the released one's parts, and its equations."""

    def __init__(self) -> None:
        super().__init__()
        self.token_mix = nn.Sequential(nn.LayerNorm(3), Turn(), _mlp(4), Turn())
        self.channel_mix = nn.Sequential(nn.LayerNorm(3), _mlp(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(x)
        return x + self.channel_mix(x)


class MixerGatingUnit(nn.Module):
    """Likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.Mixer, self.proj = MixerBlock(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.Mixer(x)


def _filled() -> tuple[MixerGatingUnit, Tensor]:
    return filled(MixerGatingUnit()), torch.cos(torch.arange(12, dtype=torch.float64) * 1.7).view(1, 4, 3)


@torch.no_grad()
def test_it_is_the_released_unit_and_that_is_read() -> None:
    want = torch.tensor(RELEASED, dtype=torch.float64).view(1, 4, 3)
    released, x = _filled()
    torch.testing.assert_close(released(x), want, atol=1e-6, rtol=0)
    ours = ROOM.build(Place(3, 1, 4, causal=False), hidden=5).double().eval()
    tokens, channels = released.Mixer.token_mix, released.Mixer.channel_mix
    for mine, theirs in (
        (ours.value, released.proj), (ours.token_norm, tokens[0]), (ours.channel_norm, channels[0]),
        (ours.token.first, tokens[2].net[0]), (ours.token.second, tokens[2].net[3]),
        (ours.channel[0], channels[1].net[0]), (ours.channel[2], channels[1].net[3]),
    ):  # fmt: skip
        mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), want, atol=1e-6, rtol=0)
    found = [read_alone(module, x, "gate") for module in (ours, released)]
    torch.testing.assert_close(*[(site.pattern.gates, site.patterns["source"].dense()) for site in found])
