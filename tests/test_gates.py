"""Gates as sites: read where other people's modules multiply, set, swept, shown, and beside attention in one model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import workbench
from workbench import CaptureError, InterventionError
from workbench.hooks.readers import read_module, reader_of, registered
from workbench.kernels.composed import RowGatedPattern
from workbench.kernels.linear import LinearPattern
from workbench.mechanisms import Place, get


class Squeeze(nn.Module):
    """Squeeze and excitation: a factor for each channel of an image, of its mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(channels, 3), nn.Linear(3, channels)

    def factor(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x.mean((2, 3))))).sigmoid()[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x * self.factor(x))


class Picture(nn.Module):
    """A gate, and attention over the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.attn = Squeeze(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.squeeze(x).flatten(2).transpose(1, 2)
        return self.attn(y, y, y)[0]


class LKA(nn.Module):
    """Built as Visual Attention Network's, with sizes of its own."""

    def __init__(self, dim: int, groups: int | None = None) -> None:
        super().__init__()
        groups = dim if groups is None else groups
        self.conv0 = nn.Conv2d(dim, dim, 3, padding=1, groups=groups)
        self.conv_spatial = nn.Conv2d(dim, dim, 5, padding=4, dilation=2, groups=groups)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x.clone() * self.conv1(self.conv_spatial(self.conv0(x)))


class Before(nn.Module):
    """Something, and attention over the patches."""

    def __init__(self, first: nn.Module, attn: nn.Module) -> None:
        super().__init__()
        self.first, self.attn = first, attn

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).flatten(2).transpose(1, 2)
        return self.attn(y, y, y)[0]


class Turn(nn.Module):
    """[batch, a, b] to [batch, b, a]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class MixerGatingUnit(nn.Module):
    """Built as NiNformer's, with sizes of its own."""

    class Block(nn.Module):
        """The Mixer block."""

        def __init__(self, dim: int, n: int, hidden: int) -> None:
            super().__init__()
            mlp = nn.Sequential(nn.Linear(n, hidden), nn.GELU(), nn.Dropout(0.5), nn.Linear(hidden, n), nn.Dropout(0.5))
            self.token_mix = nn.Sequential(nn.LayerNorm(dim), Turn(), mlp, Turn())
            self.channel_mix = nn.Sequential(
                nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.token_mix(x)
            return x + self.channel_mix(x)

    def __init__(self, dim: int, n: int, hidden: int) -> None:
        super().__init__()
        self.Mixer, self.proj = self.Block(dim, n, hidden), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.Mixer(x)


@pytest.fixture
def squeeze() -> Iterator[None]:
    """A reader of `Squeeze`, as a user would write it."""
    before = dict(registered._readers)

    @workbench.reader(Squeeze, kind="gate")
    def read(run: workbench.ModuleRun) -> workbench.Mixing:
        module: Any = run.module
        x = run.inputs["x"]
        return workbench.gating(x, module.factor(x), channels=1, finish=F.relu)

    yield
    registered._readers.clear()
    registered._readers.update(before)
    registered._of_class.clear()


def _picture() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Picture().double().eval(), torch.randn(2, 8, 4, 5).double()


@pytest.mark.usefixtures("squeeze")
def test_a_gate_stands_beside_attention_with_statistics_of_its_own(tmp_path: Path) -> None:
    model, x = _picture()
    with torch.no_grad(), workbench.attach(model) as wb:
        bare = model(x)
        with wb.capture(["entropy", "distance"]) as cap:
            assert torch.equal(model(x), bare)
        assert wb.verify(x).ok
        assert not wb.sites.unread
    gate, attention = cap["squeeze"], cap["attn"]
    assert (gate.site.kind, gate.site.alias, gate.shape) == ("gate", "blocks.0.gate", (2, 8, 20, 20))
    assert set(gate.statistics) == {"row_sum"}
    assert set(attention.statistics) == {"entropy", "distance"}
    assert gate.pattern.over == ("channel",)
    torch.testing.assert_close(gate.row_sum[..., 0], model.squeeze.factor(x)[:, :, 0, 0])
    with pytest.raises(CaptureError, match=r'"entropy" compares keys, of which a row of a gate has one') as caught:
        _ = gate.entropy
    assert "row_sum" in str(caught.value.hint)
    assert set(cap.table("row_sum").site) == {"squeeze"}
    assert set(cap.table("entropy").site) == {"attn"}
    with pytest.raises(CaptureError, match='"peak" was not captured'):
        cap.table("peak")
    again = workbench.load_capture(cap.save(tmp_path / "gate.safetensors", pattern=True))
    assert torch.equal(again["squeeze"].row_sum, gate.row_sum)
    assert torch.equal(again["squeeze"].pattern.dense(), gate.pattern.dense())
    page = workbench.Report("A gate").add(cap).write(tmp_path / "gate.html")
    assert "squeeze" in Path(page).read_text()


@pytest.mark.usefixtures("squeeze")
def test_where_all_sites_are_asked_for_a_row_sum_attention_has_ones() -> None:
    model, x = _picture()
    with torch.no_grad(), workbench.attach(model) as wb, wb.capture(["row_sum"]) as cap:
        model(x)
    assert set(cap.table("row_sum").site) == {"squeeze", "attn"}
    assert torch.equal(cap["attn"].row_sum, torch.ones(2, 2, 20).double())


@pytest.mark.usefixtures("squeeze")
def test_a_gate_that_is_set_has_the_gradients_of_what_it_is_set_to() -> None:
    model, x = _picture()
    x.requires_grad_()

    def gradient(f: Any) -> Tensor:
        return torch.autograd.grad(f(x).square().sum(), x)[0]

    def by_hand(factor: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            y = F.relu(x * factor(model.squeeze.factor(x))).flatten(2).transpose(1, 2)
            return model.attn(y, y, y)[0]

        return run

    with workbench.attach(model) as wb:
        with torch.no_grad(), wb.capture():
            model(x)
        for to, factor in (
            (0.5, lambda g: 0.5), (lambda g, site, head: g.square(), torch.square),
            (lambda g, site, head: g.detach(), Tensor.detach),
        ):  # fmt: skip
            with wb.set_gate("squeeze", to=to):
                got, gave = gradient(model), model(x)
            torch.testing.assert_close(gave, by_hand(factor)(x))
            torch.testing.assert_close(got, gradient(by_hand(factor)))


@torch.no_grad()
def test_gates_of_attention_that_weighs_its_heads_can_be_set_too() -> None:
    torch.manual_seed(0)
    layer, x = get("moh").build(Place(16, 4, 7)).eval(), torch.randn(2, 7, 16)
    with workbench.attach(layer) as wb:
        with wb.capture(["row_sum"], z=True) as cap:
            layer(x)
        q, k, v = layer.heads(x)
        torch.testing.assert_close(cap[0].row_sum, layer.route(x, q).gates)
        with wb.set_gate((0, 1), to=1.0, positions=[2, 3]), wb.capture(z=True) as without:
            layer(x)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(without[0].z[:, 2:4, 1], plain[:, 2:4, 1])
    assert torch.equal(without[0].z[:, :2], cap[0].z[:, :2])
    assert torch.equal(without[0].z[:, :, 2:], cap[0].z[:, :, 2:])


class Weighed(nn.Module):
    """Linear attention, whose rows do not sum to one, times a factor for each head and token."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ (x.mT @ x)) * x.mean(-1, keepdim=True).sigmoid()


@pytest.mark.usefixtures("squeeze")
@torch.no_grad()
def test_factors_are_no_sums_of_rows_where_rows_do_not_sum_to_one() -> None:
    @workbench.reader(Weighed, kind="self")
    def read(run: workbench.ModuleRun) -> workbench.Mixing:
        x = run.inputs["x"][:, None]
        pattern = RowGatedPattern(LinearPattern(x, x, values=x), x.mean(-1).sigmoid(), values=x)
        return workbench.Mixing(pattern, x, lambda z: z[:, 0])

    model, x = Weighed(), torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    factors = x.mean(-1).sigmoid()
    with workbench.attach(model) as wb:
        with wb.capture(["row_sum"]) as cap:
            model(x)
        with wb.set_gate(("", 0), cap):
            y = model(x)
    torch.testing.assert_close(cap[0].factors[:, 0], factors)
    assert not torch.allclose(cap[0].row_sum[:, 0], factors)
    torch.testing.assert_close(workbench.gate_profile(cap).mean, factors.double().mean()[None])
    torch.testing.assert_close(y, x @ (x.mT @ x) * factors.mean())


@pytest.mark.usefixtures("squeeze")
@torch.no_grad()
def test_what_no_gate_can_be_set_to_is_named() -> None:
    model, x = _picture()
    with workbench.attach(model) as wb:
        with pytest.raises(InterventionError, match="not known yet"), wb.set_gate("squeeze"):
            pass
        with wb.capture(["entropy"], sites="attn") as only:
            model(x)
        with wb.capture():
            model(x)
        with pytest.raises(InterventionError, match="the heads have no gate"), wb.set_gate("attn"):
            model(x)
        with pytest.raises(InterventionError, match="which is not finite"), wb.set_gate("squeeze", to=float("nan")):
            pass
        with pytest.raises(InterventionError, match="a gate is set to str"), wb.set_gate("squeeze", to="mean"):
            pass
        with pytest.raises(InterventionError, match="does not have the site's factors"), wb.set_gate("squeeze", only):
            pass
        with wb.capture() as whole:
            model(x)
        fewer = whole[0].statistics["row_sum"][:, :3]
        whole[0].statistics["row_sum"] = fewer
        with pytest.raises(InterventionError, match="has 3 heads, no head 7"), wb.set_gate("squeeze", whole):
            pass
        with pytest.raises(InterventionError, match="there is no head 8"), wb.set_gate(("squeeze", 8)):
            pass
        with pytest.raises(InterventionError, match="the factor of head 0 is"), wb.set_gate(
            ("squeeze", 0), torch.ones(3).double()
        ):  # fmt: skip
            model(x)
        for given in (None, 1, torch.ones(2, 2, 1, dtype=torch.float64)):
            with (
                pytest.raises(InterventionError, match="what the function gave for head 0 is"),
                wb.set_gate(("squeeze", 0), lambda g, site, head, given=given: given),
            ):
                model(x)
        with (
            pytest.raises(InterventionError, match=r"expected torch\.float64"),
            wb.set_gate(("squeeze", 0), torch.ones(1)),
        ):
            model(x)


@pytest.mark.filterwarnings("ignore:the sweep runs whole forwards")  # there are no blocks
@pytest.mark.usefixtures("squeeze")
@torch.no_grad()
def test_heads_of_gates_are_ranked_as_heads_of_attention_are() -> None:
    model, x = _picture()
    with workbench.attach(model) as wb:
        found = workbench.head_importance(
            wb, [{"x": x}], metric=lambda y, batch: y.mean((1, 2)), methods=("ablation",), progress=False
        )
    assert set(found.table.site) == {"blocks.0.gate", "blocks.0.attn"}
    assert (found.table.site == "blocks.0.gate").sum() == 8


@torch.no_grad()
def test_large_kernels_of_other_people_are_read() -> None:
    torch.manual_seed(0)
    judge, x = LKA(6).double().eval(), torch.randn(2, 6, 7, 9).double()
    model = nn.Sequential(judge)
    with workbench.attach(model) as wb:
        assert wb.verify(x).ok
        assert not wb.sites.unread
        with wb.capture(z=True) as cap:
            y = model(x)
    g = judge.conv1(judge.conv_spatial(judge.conv0(x)))
    torch.testing.assert_close(cap[0].pattern.gates, g.flatten(2))
    torch.testing.assert_close(cap[0].z.transpose(1, 2)[..., 0], y.flatten(2))
    for part in (judge.conv0, judge.conv_spatial, judge.conv1):
        part.bias.zero_()
    linear = judge.conv1(judge.conv_spatial(judge.conv0(x)))
    torch.testing.assert_close(cap[0].patterns["source"].dense().sum(-1), linear.flatten(2))
    assert not torch.allclose(linear, g)  # biases have a part in g


@torch.no_grad()
def test_a_large_kernel_of_another_build_is_listed_and_not_read() -> None:
    model = Before(LKA(6, groups=2), nn.MultiheadAttention(6, 3, batch_first=True)).eval()
    with workbench.attach(model) as wb:
        wb.look(torch.randn(2, 6, 4, 5))
        assert [site.name for site in wb.sites] == ["attn"]
        assert {one.name for one in wb.sites.unread} == {"first.conv0", "first.conv_spatial"}


def test_a_gating_unit_of_another_build_is_not_taken_for_one() -> None:
    class Mixer(nn.Module):
        def token_mix(self, x: Tensor) -> Tensor:
            return x

    unit = MixerGatingUnit(4, 6, 8)
    unit.Mixer = Mixer()
    assert reader_of(unit) is None
    assert reader_of(MixerGatingUnit(4, 6, 8)) is not None


@pytest.mark.usefixtures("squeeze")
@pytest.mark.parametrize("error", [AssertionError, KeyError], ids=lambda e: e.__name__)
def test_what_goes_wrong_in_a_reader_is_said_of_its_module(error: type[Exception]) -> None:
    @workbench.reader(Weighed, kind="self")
    def read(run: workbench.ModuleRun) -> workbench.Mixing:
        raise error("odd")

    x = torch.randn(1, 2, 3)
    with pytest.raises(CaptureError, match=f"Weighed is not built(?s:.*){error.__name__}"):
        read_module("here", Weighed(), (x,), {}, x)


@torch.no_grad()
def test_gating_units_of_ninformer_are_read() -> None:
    torch.manual_seed(0)
    judge, x = MixerGatingUnit(6, 9, 11).double().eval(), torch.randn(2, 9, 6).double()
    model = nn.Sequential(judge)
    with workbench.attach(model) as wb:
        assert wb.verify(x).ok
        assert not wb.sites.unread, wb.sites
        with wb.capture() as cap:
            model(x)
    torch.testing.assert_close(cap[0].pattern.gates, judge.Mixer(x).transpose(1, 2))
    z, (one, _, _, two, _) = judge.Mixer.token_mix[0](x).transpose(1, 2), judge.Mixer.token_mix[2]
    slopes = F.gelu(one(z)) / one(z)
    want = F.linear(slopes * F.linear(z, one.weight), two.weight)
    torch.testing.assert_close(cap[0].patterns["source"].total, want)
    torch.testing.assert_close(want + F.linear(slopes * one.bias, two.weight, two.bias), judge.Mixer.token_mix[2](z))
