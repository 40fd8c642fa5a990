"""Readers of modules that the package does not know: whatever works on attention works on them."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from workbench import CaptureError, InterventionError, Mixing, ModuleRun
from workbench.capture.site_capture import joined_outputs
from workbench.hooks.readers import registered
from workbench.kernels.patterns import DensePattern
from workbench.kernels.state_space import SelectivePattern


class Agents(nn.Module):
    """Attention through a few agents, softmax(q aᵀ) softmax(a kᵀ) v, then a gate and a projection."""

    def __init__(self, width: int = 12, heads: int = 3, agents: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.gate, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, width)
        self.agents = nn.Parameter(torch.randn(heads, agents, width // heads))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def factors(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        # exp over a sum rather than softmax, so that no tap takes one of the two for the whole
        spread, gather = (q @ self.agents.mT).exp(), (self.agents @ k.mT).exp()
        return spread / spread.sum(-1, keepdim=True), gather / gather.sum(-1, keepdim=True)

    def finish(self, z: Tensor, x: Tensor) -> Tensor:
        return self.out(z.transpose(1, 2).flatten(2) * self.gate(x).sigmoid())

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, str]:
        q, k, v = self.split(x * scale)
        spread, gather = self.factors(q, k)
        return self.finish(spread @ (gather @ v), x), "and something else"


class Decay(nn.Module):
    """h_t = ½ h_{t-1} + x_t: a recurrence, as a loop."""

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = 0.5 * h + x[:, t]
            out.append(h)
        return torch.stack(out, 1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Agents(), Decay(), Agents()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x, scale=0.7)[0]
        x = x + self.second(x)
        x = x + self.third(x)[0]
        return self.attention(x, x, x)[0] + x


def read_agents(run: ModuleRun) -> Mixing:
    module, x = run.module, run.inputs["x"]
    q, k, v = module.split(x * run.inputs["scale"])
    spread, gather = module.factors(q, k)
    return Mixing(
        DensePattern(spread @ gather),
        v,
        finish=lambda z: module.finish(z, x),
        kernel="agents",
        others={"spread": DensePattern(spread), "gather": DensePattern(gather)},
    )


def read_decay(run: ModuleRun) -> Mixing:
    x = run.inputs["x"]
    one = x.new_ones(x.shape[0], 1, x.shape[1], 1)
    return Mixing(SelectivePattern(one[..., 0], x.new_tensor([[0.5]]).log(), one, one), x[:, None], kernel="decay")


@pytest.fixture(autouse=True)
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registered, "_readers", dict(registered._readers))
    registered._of_class.clear()
    workbench.reader(Agents, kind="self")(read_agents)
    workbench.reader(f"{Decay.__module__}.Decay")(read_decay)
    yield
    registered._of_class.clear()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


X = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_such_modules_are_sites_and_verified(model: nn.Module) -> None:
    with workbench.attach(model) as wb:
        assert [(site.name, site.kind) for site in wb.sites] == [
            ("first", "self"), ("second", "state"), ("third", "self"), ("attention", "self"),
        ]  # fmt: skip
        report = wb.verify(X)
    assert report.ok, report.table
    assert [(check["site"], check["backend"]) for check in report.checks][:2] == [
        ("first", "reader"),
        ("second", "reader"),
    ]


@torch.no_grad()
def test_a_capture_has_the_maps_and_leaves_the_output(model: nn.Module, tmp_path: Path) -> None:
    bare = model(X)
    with workbench.attach(model) as wb, wb.capture(["entropy"], z=True, values=True) as cap:
        assert torch.equal(model(X), bare)
    assert cap.ledger == {"first": 1, "second": 1, "third": 1, "attention": 1}
    first = cap["first"]
    q, k, v = model.first.split(X * 0.7)
    spread, gather = model.first.factors(q, k)
    want = {"pattern": spread @ gather, "spread": spread, "gather": gather}
    path = cap.save(tmp_path / "agents.safetensors", pattern=True)
    for held in (first, workbench.load_capture(path)["first"]):
        assert next(iter(held.patterns)) == "pattern"
        assert set(held.patterns) == set(want)
        assert held.patterns["spread"].shape == (2, 3, 7, 4)
        for name, pattern in held.patterns.items():
            torch.testing.assert_close(pattern.dense(), want[name])
    torch.testing.assert_close(first.z, (want["pattern"] @ v).transpose(1, 2))
    torch.testing.assert_close(first.entropy, -(want["pattern"] * want["pattern"].log()).sum(-1))
    assert (first.site.n_heads, first.site.d_head, first.kernel, first.marks) == (3, 4, "agents", "normalised")
    assert cap["second"].marks == "signed"
    assert set(cap.table("entropy")["site"]) == {"first", "second", "third", "attention"}
    assert cap.nbytes > sum(tensor.nbytes for tensor in want.values())


@torch.no_grad()
@pytest.mark.parametrize("site", ["first", "third"])
def test_ablation_patch_and_edit_are_those_by_hand(model: nn.Module, site: str) -> None:
    module = model.get_submodule(site)

    def by_hand(change: Any) -> Tensor:
        def forward(x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, str]:
            q, k, v = module.split(x * scale)
            spread, gather = module.factors(q, k)
            return module.finish(change(spread @ gather, v), x), "and something else"

        module.forward = forward
        try:
            return model(X)
        finally:
            del module.forward

    def without_one(a: Tensor, v: Tensor) -> Tensor:
        return (a @ v) * torch.tensor([1.0, 0.0, 1.0])[:, None, None]

    def patched(a: Tensor, v: Tensor) -> Tensor:
        z = a @ v
        z[:, 2, -1] = 1.0
        return z

    def rolled(a: Tensor, v: Tensor) -> Tensor:
        return torch.cat((a[:, :1].roll(1, -1), a[:, 1:]), dim=1) @ v

    with workbench.attach(model) as wb:
        with wb.ablate((site, 1)):
            torch.testing.assert_close(model(X), by_hand(without_one))
        with wb.patch({(site, 2): torch.ones(4)}, positions=-1):
            torch.testing.assert_close(model(X), by_hand(patched))
        with wb.edit_pattern((site, 0), lambda rows, site, head: rows.roll(1, -1)):
            torch.testing.assert_close(model(X), by_hand(rolled))
        with wb.ablate((site, 1), "mean", reference={"x": X}), wb.capture(z=True) as cap:
            model(X)
        z = cap[site].z
        torch.testing.assert_close(z[:, :, 1], z[:1, :1, 1].expand(2, 7, 4))


@torch.no_grad()
def test_sweeps_take_them(model: nn.Module) -> None:
    with workbench.attach(model) as wb:
        variants = [workbench.Variant(("first", head)) for head in range(3)]
        found = workbench.run_sweep(wb, variants, [{"x": X}], lambda y, batch: y.mean((1, 2)), progress=False)
        for head in range(3):
            with wb.ablate(("first", head)):
                torch.testing.assert_close(found.values[head, 0], model(X).mean((1, 2)).double())


class Late(nn.Module):
    """A gated mean, whose projection is not the last step over long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(12, 12)

    def finish(self, z: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.out(z.transpose(1, 2).flatten(2) * x.sigmoid())
        return y if x.shape[1] < 5 else y + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x.mean(1, keepdim=True).expand_as(x).unflatten(-1, (3, 4)).transpose(1, 2), x)


@torch.no_grad()
def test_results_are_of_what_entered_the_projection_in_that_forward() -> None:
    def read(run: ModuleRun) -> Mixing:
        x, module = run.inputs["x"], run.module
        weights = x.new_full((len(x), 3, x.shape[1], x.shape[1]), 1 / x.shape[1])
        values = x.unflatten(-1, (3, 4)).transpose(1, 2)
        return Mixing(DensePattern(weights), values, lambda z: module.finish(z, x))  # type: ignore[operator]

    workbench.reader(Late, kind="self")(read)
    model = nn.Sequential(Late()).eval()
    with workbench.attach(model) as wb, wb.capture(z=True) as cap:
        short = model(X[:, :4])
        model(X)
    first, second = (forward.sites["0"] for forward in cap.forwards)
    torch.testing.assert_close(first.result().sum(2) + model[0].out.bias, short)
    assert second.entering is None
    with pytest.raises(CaptureError, match="output projection of the site is not known"):
        second.result()
    for both in ([first, second], [second, first]):
        joined = joined_outputs(both)
        assert joined["entering"] is None
        assert joined["projection"] is None
    again = joined_outputs([first, first])
    assert torch.equal(again["entering"], torch.cat([first.entering] * 2, dim=1))
    assert again["projection"] == first.projection


class Normed(nn.Module):
    """A mean behind a norm of the batch, which keeps running means, and dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(12), nn.Dropout(dropout)

    def finish(self, z: Tensor) -> Tensor:
        y: Tensor = self.drop(self.norm(z.transpose(1, 2).flatten(2).mT).mT)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(
            x.mean(1, keepdim=True).expand_as(x).unflatten(-1, (3, 4)).transpose(1, 2) + x[:, None, :, :4]
        )


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_model_in_training_is_left_as_it_is(dropout: float) -> None:
    def read(run: ModuleRun) -> Mixing:
        x, module = run.inputs["x"], run.module
        n = x.shape[1]
        weights = torch.cat((x.new_full((len(x), 3, n, n), 1 / n), torch.eye(n).expand(len(x), 3, n, n)), dim=-1)
        values = x.unflatten(-1, (3, 4)).transpose(1, 2)
        more = x[:, None, :, :4].expand_as(values)
        return Mixing(DensePattern(weights), torch.cat((values, more), dim=2), module.finish)  # type: ignore[arg-type]

    workbench.reader(Normed, kind="self")(read)
    model, alone = (nn.Sequential(Normed(dropout)).train() for _ in range(2))
    torch.manual_seed(0)
    alone(X).square().sum().backward()
    want = torch.get_rng_state()
    torch.manual_seed(0)
    refused = pytest.raises(CaptureError, match="is not what the module computes") if dropout else nullcontext()
    with workbench.attach(model) as wb, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with refused, wb.capture(z=True):
            model(X).square().sum().backward()
    assert torch.equal(torch.get_rng_state(), want)
    for one, other in zip(model.buffers(), alone.buffers(), strict=True):
        assert torch.equal(one, other)
    if dropout == 0:
        assert torch.equal(model[0].norm.weight.grad, alone[0].norm.weight.grad)


@torch.no_grad()
def test_a_reading_that_is_not_what_the_module_does_is_refused(model: nn.Module) -> None:
    def wrong(run: ModuleRun) -> Mixing:
        made = read_agents(run)
        return Mixing(DensePattern(made.pattern.weights.roll(1, -2)), made.values, made.finish)

    workbench.reader(Agents)(wrong)
    with workbench.attach(model) as wb:
        with pytest.raises(CaptureError, match="not what the module computes") as caught, wb.capture():
            model(X)
        assert caught.value.site == "first"
        report = wb.verify(X)
    assert [check["ok"] for check in report.checks] == [False, True, False, True]


@torch.no_grad()
def test_a_finish_that_mixes_positions_is_proved_as_a_whole(model: nn.Module) -> None:
    class Reversed(Decay):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(1)

    @workbench.reader(Reversed)
    def flipped(run: ModuleRun) -> Mixing:
        made = read_decay(run)
        return Mixing(made.pattern, made.values, finish=lambda z: z[:, 0].flip(1))

    model.second = Reversed()
    with workbench.attach(model) as wb, wb.capture() as cap:
        model(X)
    assert cap["second"].kernel == "module"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda made: "nothing", "gave str"),
        (lambda made: Mixing(made.pattern, made.values[:, :, 1:]), "values are"),
        (lambda made: Mixing(made.pattern, made.values, others={"a/b": made.pattern}), "cannot be called"),
    ],
)
@torch.no_grad()
def test_what_a_reader_may_not_give(model: nn.Module, given: Any, message: str) -> None:
    workbench.reader(Agents)(lambda run: given(read_agents(run)))
    with workbench.attach(model) as wb, pytest.raises(CaptureError, match=message) as caught, wb.capture():
        model(X)
    assert caught.value.site == "first"


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(X).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("site", ["first", "third"])
def test_gradients_flow_through_an_edited_module(model: nn.Module, site: str) -> None:
    def halve(module: Agents) -> Any:
        factors = torch.tensor([1.0, 0.5, 1.0])[:, None, None]
        return lambda z, x: Agents.finish(module, z * factors, x)

    module: Any = model.get_submodule(site)
    module.finish = halve(module)
    wanted = _gradients(model)
    del module.finish
    with workbench.attach(model) as wb:
        with wb.patch({(site, 1): lambda z, site, head: z / 2}):
            patched = _gradients(model)
        with wb.edit_pattern({(site, 1)}, lambda rows, site, head: rows / 2):
            edited = _gradients(model)
    for found in (patched, edited):
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_reader_that_holds_something_fixed_has_no_gradients(model: nn.Module) -> None:
    @workbench.reader(Agents, kind="self")
    def detached(run: ModuleRun) -> Mixing:
        made = read_agents(run)
        return Mixing(DensePattern(made.pattern.weights.detach()), made.values, made.finish)

    with workbench.attach(model) as wb, wb.ablate(("first", 0)):
        with pytest.raises(InterventionError, match="gradients do not flow") as caught:
            model(X)
        assert caught.value.site == "first"
        with torch.no_grad():
            model(X)


def test_a_module_is_told_whether_it_goes_on_from_a_cache(model: nn.Module) -> None:
    class Cached(Decay):
        def forward(self, x: Tensor, cache_params: Any = None) -> Tensor:
            return super().forward(x)

    class Cache:
        has_previous_state = True

    seen: list[bool | None] = []

    @workbench.reader(Cached)
    def watched(run: ModuleRun) -> Mixing:
        seen.append(run.continued)
        return read_decay(run)

    module = Cached()
    with workbench.attach(module) as wb, wb.capture():
        module(X)
        module(X, Cache())
        module(X, cache_params="one that does not tell")
    assert seen == [False, True, True]


def test_a_reader_needs_a_class() -> None:
    with pytest.raises(CaptureError, match="for classes or their names"):
        workbench.reader(3)  # type: ignore[arg-type]
