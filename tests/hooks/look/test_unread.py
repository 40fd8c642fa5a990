"""Modules that mix tokens unread are found by what they do; keys are told from what only looks like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import workbench
from workbench import CaptureError
from workbench.hooks.listener import Listener
from workbench.hooks.look.keys import probe_keys
from workbench.hooks.look.replay import OnCall, Replays
from workbench.hooks.look.unread import find_unread
from workbench.hooks.observer import observed
from workbench.hooks.sites import Unread

D, N = 12, 9


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """A function of [batch, position, feature], with a residual around it and a linear layer before."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.mix = nn.Linear(D, D), mix

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.inner(x))


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Calls(Listener):
    """Hands on the calls."""

    def __init__(self, on_call: OnCall) -> None:
        self.on_call = on_call  # type: ignore[method-assign]

    def leaves_native_path(self) -> bool:
        return True


def replays(model: nn.Module, *args: Any, limit: int = 1 << 30) -> Replays:
    return Replays(model.eval(), args, {}, lambda on_call: observed(model, Calls(on_call)), limit)


def unread(model: nn.Module, x: Tensor | None = None) -> list[Unread]:
    with replays(model, torch.randn(2, N, D) if x is None else x) as recorded:
        return find_unread(recorded)


def scan(x: Tensor) -> Tensor:
    state, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = 0.5 * state + x[:, t]
        out.append(state)
    return torch.stack(out, 1)


def linear_attention(x: Tensor) -> Tensor:
    return F.elu(x) @ (F.elu(x).transpose(1, 2) @ x)


def k_means(x: Tensor) -> Tensor:
    nearest = torch.cdist(x, x[:, :3]).argmin(-1)
    one_hot = F.one_hot(nearest, 3).to(x)
    return one_hot @ (one_hot.transpose(1, 2) @ x) / N


MIXERS = {
    "scan": (scan, "later"),
    "cumulative sum": (lambda x: x.cumsum(1), "later"),
    "shift": (lambda x: F.pad(x, (0, 0, 1, -1)), "neighbours"),
    "convolution": (lambda x: F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2), "neighbours"),
    "linear attention": (linear_attention, "others"),
    "fourier": (lambda x: torch.fft.fft(x, dim=1).real, "others"),
    "centring": (lambda x: x - x.mean(1, keepdim=True), "others"),
    "k-means": (k_means, "others|neighbours"),
    "sigmoid attention": (lambda x: torch.sigmoid(x @ x.transpose(1, 2)) @ x, "others"),
    "the largest": (lambda x: x[torch.arange(len(x)), x[..., 0].argmax(1)][:, None].expand_as(x), "others"),
    "exponentials": (lambda x: (e := torch.exp(x @ x.transpose(1, 2))) / e.sum(-1, keepdim=True) @ x, "others"),
}


@pytest.mark.parametrize("name", MIXERS)
def test_mixing_of_every_kind_is_found(name: str) -> None:
    torch.manual_seed(0)
    mix, reason = MIXERS[name]
    found = unread(Model(Attention(), Mixer(mix), Attention()))
    assert [(one.name, one.cls, one.proved) for one in found] == [("blocks.1", "Mixer", True)]
    assert any(word in found[0].reason for word in reason.split("|")), found[0].reason


def test_attention_that_is_read_and_layers_by_position_are_not_listed() -> None:
    torch.manual_seed(0)
    by_position = Mixer(lambda x: F.gelu(x) * x.softmax(-1))
    assert unread(Model(Attention(), by_position, Attention())) == []
    assert unread(nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, batch_first=True), 2)) == []


def test_weights_of_a_pool_of_tokens_are_no_output_of_theirs() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.probe = nn.MultiheadAttention(D, 4, batch_first=True), nn.Parameter(torch.ones(1, 1, D))

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(self.probe.expand(len(x), 1, D), x, x)[0]  # with their mean weights beside it

    assert unread(Pool()) == []


def test_mixing_is_put_down_to_the_module_that_does_it() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.conv = Attention(), nn.Conv1d(D, D, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x) + self.conv(x.transpose(1, 2)).transpose(1, 2)

    class Own(Both):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.cumsum(1)

    assert [one.name for one in unread(Model(Both(), Attention()))] == ["blocks.0.conv"]
    assert [one.name for one in unread(Model(Own()))] == ["blocks.0", "blocks.0.conv"]


class Branch(Attention):
    """Attention with something behind it before anything is added, perhaps in windows of three positions."""

    def __init__(self, behind: nn.Module | Callable[[Tensor], Tensor], *, windows: bool = False) -> None:
        super().__init__()
        self.behind, self.windows = behind, windows

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x.reshape(-1, 3, D)).reshape(x.shape) if self.windows else super().forward(x)
        return self.behind(z)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_what_mixes_behind_attention_is_found(inner: bool, windows: bool) -> None:
    torch.manual_seed(0)
    mix = MIXERS["sigmoid attention"][0]
    behind = Mixer(mix) if inner else mix
    for model in (nn.Sequential(Branch(behind, windows=windows)), Model(Branch(behind, windows=windows), Attention())):
        name = "0" if isinstance(model, nn.Sequential) else "blocks.0"
        assert [one.name for one in unread(model)] == [f"{name}.behind" if isinstance(behind, nn.Module) else name]


@pytest.mark.parametrize("windows", [False, True])
def test_what_is_done_by_position_behind_attention_is_no_mixing(windows: bool) -> None:
    torch.manual_seed(0)
    blocks = [Branch(nn.Sequential(nn.Linear(D, D), nn.GELU()), windows=windows) for _ in range(2)]
    assert unread(nn.Sequential(*blocks)) == []
    assert unread(nn.Sequential(blocks[0], Attention(), Branch(lambda x: x.flip(1)))) == []


def test_a_gate_of_zero_hides_nothing_that_it_lets_through() -> None:
    """Clearing a block as a whole is clearing what it does with the weights that it has."""
    block = Mixer(lambda x: 0.0 * x.cumsum(1))
    assert unread(Model(block)) == []


def test_sequences_of_other_lengths_are_tried_on_their_own() -> None:
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Model(Mixer(scan)), Model(Attention())

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.decoder(y + self.encoder(x)[:, :1])

    with replays(TwoTowers(), torch.randn(2, 11, D), torch.randn(2, N, D)) as recorded:
        assert "encoder.blocks.0" in [one.name for one in find_unread(recorded)]


def test_a_stack_that_runs_twice_stands_there_once() -> None:
    class Twice(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    assert [one.name for one in unread(Twice(Mixer(scan)))] == ["blocks.0"]


def test_modules_with_a_state_are_named_as_not_tried() -> None:
    class Stateful(nn.Module):
        seen = 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1.0
            return x.cumsum(1) * self.seen

    found = unread(Model(Attention(), Stateful()))
    assert [(one.name, one.proved) for one in found] == [("blocks.1", False)]
    assert "state" in found[0].reason


def test_dropout_in_training_is_no_mixing() -> None:
    model = Model(Attention(), nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)))
    model.train()
    with Replays(model, (torch.randn(2, N, D),), {}, lambda f: observed(model, Calls(f)), 1 << 30) as r:
        assert find_unread(r) == []


def test_nothing_stays_behind() -> None:
    model, x = Model(Attention(), Mixer(scan)).eval(), torch.randn(2, N, D)
    want, state, copy = model(x), torch.get_rng_state(), x.clone()
    unread(model, x)
    assert torch.equal(model(x), want)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, copy)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(CaptureError, match="more than 1,000 bytes"), replays(model, x, limit=1000):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Keyed(nn.Module):
    """Attention whose keys and values `keys` makes of the input."""

    def __init__(self, keys: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.kv, self.keys = nn.Linear(D, D), nn.Linear(D, 2 * D), keys

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(self.keys(x)).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (self.q(x), k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


KEYS = {
    "as they are": (lambda x: x, "positions", (N // 2,)),
    "in another order": (lambda x: x.flip(1), "moved", (N - 1 - N // 2,)),
    "after a prefix": (lambda x: torch.cat([torch.ones(2, 2, D), x], 1), "positions", (N // 2 + 2,)),
    "of neighbours": (lambda x: x + x.roll(1, 1), "positions", (N // 2, N // 2 + 1)),
    "every third": (lambda x: x[:, ::3], "pooled", ()),
    "pooled": (lambda x: F.avg_pool1d(x.transpose(1, 2), 3, 3).transpose(1, 2), "pooled", (1,)),
    "slots": (lambda x: (x @ torch.ones(D, 4)).softmax(1).transpose(1, 2) @ x, "summaries", (0, 1, 2, 3)),
    "learned": (lambda x: torch.linspace(-1, 1, 5 * D).view(1, 5, D).expand(2, -1, -1), "elsewhere", ()),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_are_positions_or_are_told_not_to_be(name: str) -> None:
    torch.manual_seed(0)
    keys, over, at = KEYS[name]
    model = Model(Keyed(keys))
    with replays(model, torch.randn(2, N, D)) as recorded:
        call = next(call for call in recorded.calls if call.name == "blocks.0")
        [found] = probe_keys(recorded, call)
    assert (found.over, found.moved) == (over, at)
    assert found.mixed == (name == "of neighbours")


def test_learned_queries_are_no_positions_however_many_they_are() -> None:
    torch.manual_seed(0)
    learned = Keyed(lambda x: x)
    learned.q.forward = lambda x: learned.q.weight[: len(x[0])].expand(len(x), -1, -1)  # type: ignore[method-assign]
    with replays(Model(learned), torch.randn(2, N, D)) as recorded:
        [found] = probe_keys(recorded, next(call for call in recorded.calls if call.name == "blocks.0"))
    assert found.over == "moved"


def test_keys_that_read_neighbours_are_listed() -> None:
    """What mixes inside an attention module, before its kernel, hides behind that kernel."""
    torch.manual_seed(0)
    shifted = Keyed(lambda x: x + F.pad(x, (0, 0, 1, -1)))
    conv = nn.Conv1d(D, D, 3, padding=1)
    convolved = Keyed(lambda x: conv(x.transpose(1, 2)).transpose(1, 2))
    convolved.conv = conv
    for block, name in ((shifted, "blocks.0"), (convolved, "blocks.0"), (Keyed(lambda x: x), None)):
        with workbench.attach(Model(block, Attention()).eval(), check=False) as wb, torch.no_grad():
            wb.look(torch.randn(2, N, D))
            assert [one.name for one in wb.sites.unread] == ([] if name is None else [name])
            assert [site.kind for site in wb.sites] == ["self", "self"]
