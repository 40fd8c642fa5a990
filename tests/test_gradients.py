"""Gradients of attention: those of autograd on attention that is written out, and nothing left behind."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import workbench
from support.autograd import loss_of, sums_of, written_out
from support.kernel_models import KERNELS, kernel_model
from support.tiny import FAMILIES, Family, eager_twin, family, make
from workbench import CaptureError
from workbench.hooks.edits import Edit
from workbench.hooks.tap import AttentionCall
from workbench.kernels.gradients import GRADIENT_SUMS, attention_times_gradient

BY_NAME = {family.name: family for family in FAMILIES}
GPT2 = BY_NAME["gpt2"]
LLAMA = family("llama-left-padded")
COMPARED = [GPT2, LLAMA, BY_NAME["bert"], BY_NAME["vit"], BY_NAME["t5"]]


@pytest.fixture
def model() -> nn.Module:
    return make(GPT2)


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def captured(model: nn.Module, inputs: dict[str, Any], **options: Any) -> workbench.Capture:
    with workbench.attach(model) as wb, wb.capture([], gradients=True, **options) as capture:
        loss_of(model(**inputs), inputs).backward()
    return capture


def assert_near(got: Tensor, want: Tensor, tolerance: float, name: str = "") -> None:
    """Within `tolerance` of the largest number."""
    scale = max(1.0, want.abs().max().item())
    torch.testing.assert_close(got, want.to(got.dtype), atol=tolerance * scale, rtol=0, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("family", COMPARED, ids=lambda f: f.name)
def test_in_float64_they_are_those_of_autograd(family: Family) -> None:
    model, inputs = make(family).double(), in_float64(family.inputs())
    with written_out(model) as (twin, seen):
        loss_of(twin(**inputs), inputs).backward()
    capture = captured(model, inputs)
    assert [site.name for site in capture.sites] == list(seen)
    for name, (weights, z) in seen.items():
        site = capture[name]
        assert_near(site.z_gradient, z.grad.transpose(1, 2), 1e-10, f"{name} z_gradient")
        for statistic, want in sums_of(weights).items():
            assert_near(getattr(site, statistic), want, 1e-10, f"{name} {statistic}")


@pytest.mark.parametrize("family", COMPARED, ids=lambda f: f.name)
def test_in_float32_they_are_those_of_eager_attention(family: Family) -> None:
    model, inputs = make(family), family.inputs()
    with torch.no_grad():  # weights of the usual size: the sums are compared, not how far float32 drifts apart
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.dim() > 1 else 1.0)
    output = eager_twin(model)(**inputs, output_attentions=True)
    attentions = {kind: output[field] for field, kind in family.outputs.items()}
    for weights in (w for several in attentions.values() for w in several):
        weights.retain_grad()
    loss_of(output, inputs).backward()
    capture = captured(model, inputs)
    for (tower, kind), several in attentions.items():
        sites = [site for site in capture.sites if (site.tower, site.kind) == (tower, kind)]
        for site, weights in zip(sites, several, strict=True):
            for statistic, want in sums_of(weights).items():
                assert_near(getattr(capture[site], statistic), want, 1e-5, f"{site.name} {statistic}")


def test_head_gradient_is_that_of_a_gate(model: nn.Module) -> None:
    """Scaling a head's output is scaling its rows of W_O, whose gradient autograd gives."""
    capture = captured(model, GPT2.inputs())
    for site in capture:
        weight = model.get_submodule(site.site.name).c_proj.weight  # [head · d_head, d_model]
        gate = (weight * weight.grad).detach().sum(-1).unflatten(0, (4, 8)).sum(-1)
        assert_near(site.head_gradient.sum(0), gate, 1e-5)


def test_the_parts_fit_each_other(model: nn.Module) -> None:
    for site in captured(model, GPT2.inputs(), z=True):
        assert site.z_gradient.shape == site.z.shape == (2, 17, 4, 8)
        assert site.query_gradient.shape == site.key_gradient.shape == (2, 4, 17)
        assert_near((site.z * site.z_gradient).sum(-1).transpose(1, 2), site.query_gradient, 1e-5)
        assert_near(site.query_gradient.sum(-1), site.head_gradient, 1e-5)
        assert_near(site.key_gradient.sum(-1), site.head_gradient, 1e-5)
        assert (site.key_gradient_magnitude >= site.key_gradient.abs() - 1e-5).all()
        assert {"query_gradient", "head_gradient"} <= set(dir(site))


@pytest.mark.parametrize("family", [GPT2, BY_NAME["t5"]], ids=lambda f: f.name)
def test_the_model_does_not_notice(family: Family) -> None:
    inputs, bare, observed = family.inputs(), make(family), make(family)
    want = bare(**inputs)
    loss_of(want, inputs).backward()
    with workbench.attach(observed) as wb, wb.capture(gradients=True, z=True):
        got = observed(**inputs)
        loss_of(got, inputs).backward()
    assert torch.equal(got["logits"], want["logits"])
    pairs = list(zip(bare.named_parameters(), observed.parameters(), strict=True))
    assert sum(p.grad is not None for (_, p), _ in pairs) > 10
    for (name, p), other in pairs:
        assert (p.grad is None) == (other.grad is None), name
        assert p.grad is None or torch.equal(p.grad, other.grad), name


def test_they_are_there_after_each_backward_and_add_up(model: nn.Module) -> None:
    inputs = GPT2.inputs()
    with workbench.attach(model) as wb, wb.capture([], gradients=True) as capture:
        loss = loss_of(model(**inputs), inputs)
        loss.backward(retain_graph=True)
        once = {name: getattr(capture[1], name) for name in (*GRADIENT_SUMS, "z_gradient")}
        (2 * loss).backward()
        for name, value in once.items():
            torch.testing.assert_close(getattr(capture[1], name), 3 * value)


def test_nothing_is_left_on_the_graph(model: nn.Module) -> None:
    inputs = GPT2.inputs()
    kept = []

    class Spy(Edit):
        def __call__(self, call: AttentionCall, z: Tensor) -> Tensor:
            kept.append(call.output)
            return z

    with workbench.attach(model) as wb:
        with wb.editing(Spy([wb.sites[0].name])), wb.capture([], gradients=True) as capture:
            loss = loss_of(model(**inputs), inputs)
            assert kept[0]._backward_hooks  # or what follows could not fail
            loss.backward(retain_graph=True)
        before = capture[0].z_gradient
        assert not kept[0]._backward_hooks
        loss.backward()
        assert capture[0].z_gradient is before


def test_what_was_held_for_them_is_let_go(model: nn.Module) -> None:
    inputs, values = GPT2.inputs(), []

    class Spy(Edit):
        def __call__(self, call: AttentionCall, z: Tensor) -> Tensor:
            values.append(weakref.ref(call.v.untyped_storage()))
            return z.clone()

    with workbench.attach(model) as wb:
        with wb.editing(Spy([wb.sites[0].name])), wb.capture([], gradients=True) as capture:
            loss_of(model(**inputs), inputs).backward()
        gc.collect()
        assert capture[0].head_gradient.isfinite().all()
        assert values[0]() is None


def test_an_error_inside_leaves_no_hook(model: nn.Module) -> None:
    inputs = GPT2.inputs()
    with workbench.attach(model) as wb:
        kept: list[Tensor] = []
        with pytest.raises(KeyError), wb.capture([], gradients=True) as capture:
            {"loss": kept.append(loss_of(model(**inputs), inputs))}["losses"]
        kept[0].backward()
    assert capture[0].z_gradient is None


def test_what_an_edit_lets_through(model: nn.Module) -> None:
    """z_gradient is that of what the model goes on with; the sums belong to what the kernel gave."""
    inputs = GPT2.inputs()

    class Halve(Edit):
        def __call__(self, call: AttentionCall, z: Tensor) -> Tensor:
            gate = torch.ones(4, 1, 1)
            gate[2] = 0.5
            return z * gate

    class Cut(Edit):
        def __call__(self, call: AttentionCall, z: Tensor) -> Tensor:
            return z.detach().clone().requires_grad_()

    name = "transformer.h.1.attn"
    with workbench.attach(model) as wb:
        with wb.editing(Halve([name])), wb.capture([], gradients=True, z=True) as capture:
            loss_of(model(**inputs), inputs).backward()
        with wb.editing(Cut([name])), wb.capture([], gradients=True) as cut:
            loss_of(model(**inputs), inputs).backward()
    site = capture[name]
    product = (site.z * site.z_gradient).sum((1, 3))
    torch.testing.assert_close(site.head_gradient, product)  # z is halved, its gradient is not: so is the kernel's
    assert cut[name].z_gradient.abs().max() > 0
    assert (cut[name].head_gradient == 0).all()


def test_half_precision(model: nn.Module) -> None:
    inputs = GPT2.inputs()
    capture = captured(model.bfloat16(), inputs, values=True)
    for site in capture:
        assert site.z_gradient.dtype == site.key_gradient.dtype == torch.float32
        want = attention_times_gradient(site.pattern, site.z_gradient.transpose(1, 2), site.pattern.values)
        for name, value in want.items():
            torch.testing.assert_close(getattr(site, name), value)


def test_autocast(model: nn.Module) -> None:
    inputs = GPT2.inputs()
    with workbench.attach(model) as wb, wb.capture([], gradients=True, values=True) as capture:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**inputs)
        loss_of(output, inputs).backward()
    site = capture[0]
    assert site.pattern.values.dtype == torch.bfloat16
    want = attention_times_gradient(site.pattern, site.z_gradient.transpose(1, 2), site.pattern.values)
    torch.testing.assert_close(site.key_gradient, want["key_gradient"])


def test_pytorchs_own_layers() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
    ).eval()
    x = torch.randn(2, 5, 16)
    bare = model(x).detach()
    with workbench.attach(model) as wb, wb.capture([], gradients=True) as capture:
        out = model(x)
        (out**2).sum().backward()
    assert torch.equal(out.detach(), bare)
    for site in capture:
        module = model.get_submodule(site.site.name)
        weight = module.out_proj.weight  # [d_model, head · d_head]
        gate = (weight * weight.grad).detach().sum(0).unflatten(0, (4, 4)).sum(-1)
        assert_near(site.head_gradient.sum(0), gate, 1e-5)


class SingleHead(nn.Module):
    """Attention on [batch, position, d], of one head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1), is_causal=True)


def assert_fits_its_pattern(site: Any) -> None:
    """The sums are those of the captured weights and values with the captured gradient of z."""
    v = site.pattern.values
    d_a = site.z_gradient.transpose(1, 2) @ v.transpose(-1, -2)
    product = site.pattern.dense() * d_a
    want = (product.sum(-1), product.sum(-2), product.sum((-1, -2)), product.abs().sum(-2))
    for name, value in zip(GRADIENT_SUMS, want, strict=True):
        assert_near(getattr(site, name), value, 1e-5, name)


def test_attention_of_one_head_without_a_head_axis() -> None:
    model, x = SingleHead(), torch.randn(3, 7, 8)
    with workbench.attach(model) as wb, wb.capture([], gradients=True, values=True, z=True) as capture:
        out = model(x)
        out.retain_grad()
        (out**3).sum().backward()
    site = capture.sites[0]
    assert torch.equal(capture[site].z_gradient.squeeze(2), out.grad)
    assert_fits_its_pattern(capture[site])


@pytest.mark.parametrize("kernel", KERNELS)
def test_our_own_kernels(kernel: str) -> None:
    model, ids = kernel_model(kernel, kernel)
    with workbench.attach(model) as wb, wb.capture([], gradients=True, values=True) as capture:
        (model(ids) ** 2).sum().backward()
    for site in capture:
        weight = model.get_submodule(site.site.name).out.weight  # [d_model, head · d_head]
        gate = (weight * weight.grad).detach().sum(0).unflatten(0, (4, -1)).sum(-1)
        assert_near(site.head_gradient.sum(0), gate, 1e-4)
        assert_fits_its_pattern(site)


def test_nobody_called_backward(model: nn.Module) -> None:
    with (
        workbench.attach(model) as wb,
        pytest.raises(CaptureError, match="no gradient arrived at") as caught,
        wb.capture(gradients=True),
    ):
        model(**GPT2.inputs())
    assert "loss.backward() inside" in str(caught.value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_without_gradients(model: nn.Module, mode: type) -> None:
    with (
        workbench.attach(model) as wb,
        pytest.raises(CaptureError, match="ran under no_grad"),
        mode(),
        wb.capture(gradients=True),
    ):
        model(**GPT2.inputs())


def test_a_frozen_model(model: nn.Module) -> None:
    model.requires_grad_(False)
    with (
        workbench.attach(model) as wb,
        pytest.raises(CaptureError, match="no attention output requires grad"),
        wb.capture(gradients=True),
    ):
        model(**GPT2.inputs())


def test_a_frozen_part(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.transformer.h[1].requires_grad_(True)
    inputs = GPT2.inputs()
    with workbench.attach(model) as wb:
        with (
            pytest.warns(UserWarning, match=r"at 1 of 2 attention calls: transformer\.h\.0\.attn"),
            wb.capture([], gradients=True) as capture,
        ):
            loss_of(model(**inputs), inputs).backward()
        assert capture[1].head_gradient.shape == (2, 4)
        with pytest.raises(CaptureError, match=r"gradients=True"):
            _ = capture[0].head_gradient
        with (
            pytest.raises(CaptureError, match=r"arrived at transformer\.h\.0\.attn"),
            wb.capture([], sites=[0, 1], gradients=True),
        ):
            loss_of(model(**inputs), inputs).backward()


def test_dropout_of_weights_is_refused(model: nn.Module) -> None:
    model.train()
    with (
        workbench.attach(model) as wb,
        pytest.warns(UserWarning, match="train mode"),
        pytest.raises(CaptureError, match="drops out here") as caught,
        wb.capture(gradients=True),
    ):
        model(**GPT2.inputs())
    assert "model.eval()" in str(caught.value)


class Checkpointed(nn.Module):
    """Two attention layers that autograd runs again in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0) for _ in range(2)
        )

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if again else layer(x)
        return x


def test_checkpointing() -> None:
    model, x = Checkpointed(reentrant=False), torch.randn(2, 5, 16, requires_grad=True)
    found = []
    for again in (False, True):
        with workbench.attach(model) as wb, wb.capture([], gradients=True) as capture:
            (model(x, again) ** 2).sum().backward()
        assert len(capture.calls) == 1
        found.append(capture)
    for plain, replayed in zip(*found, strict=True):
        torch.testing.assert_close(plain.key_gradient, replayed.key_gradient)


def test_reentrant_checkpointing_is_refused() -> None:
    model, x = Checkpointed(reentrant=True), torch.randn(2, 5, 16, requires_grad=True)
    with (
        workbench.attach(model) as wb,
        pytest.raises(CaptureError, match="no gradient arrived"),
        wb.capture([], gradients=True),
    ):
        (model(x) ** 2).sum().backward()


class Overwriting(nn.Module):
    """Attention whose weights need no gradient, so that autograd does not mind when the values change afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 1
        self.v = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x)
        out = torch.softmax(x @ x.transpose(-1, -2), dim=-1) @ v
        v.mul_(2)
        return out


def test_values_that_are_overwritten_before_the_backward() -> None:
    model = Overwriting()
    with workbench.attach(model) as wb, wb.capture([]):
        model(torch.randn(1, 5, 8)).sum().backward()
    with (
        workbench.attach(model) as wb,
        pytest.raises(CaptureError, match="overwritten a tensor"),
        wb.capture([], gradients=True),
    ):
        model(torch.randn(1, 5, 8)).sum().backward()


def test_several_forwards_files_tables_and_pools(model: nn.Module, tmp_path: Path) -> None:
    ids = GPT2.inputs()["input_ids"]
    both = captured(model, {"input_ids": ids})
    with workbench.attach(model) as wb, wb.capture([], gradients=True) as apart:
        for rows in (ids[:1], ids[1:]):
            loss_of(model(rows), {}).backward()
    assert [forward[0].z_gradient.shape[0] for forward in apart.calls] == [1, 1]
    assert apart.pool()[0].head_gradient.shape == (2, 4)
    assert apart.pool()[0].z_gradient.shape == (2, 17, 4, 8)
    assert both.stack("head_gradient").shape == (2, 2, 4)
    frame = both.table("head_gradient")
    row = frame[(frame.layer == 1) & (frame.batch == 0) & (frame["head"] == 2)].iloc[0]
    assert row.head_gradient == pytest.approx(both[1].head_gradient[0, 2].item())
    again = workbench.load_capture(both.save(tmp_path / "run.safetensors"))
    assert torch.equal(again[0].key_gradient_magnitude, both[0].key_gradient_magnitude)
    assert torch.equal(again[0].z_gradient, both[0].z_gradient)


def test_their_bytes_count(model: nn.Module) -> None:
    with workbench.attach(model) as wb:
        kept = {"statistics": [], "queries_keys": False}
        planned = wb.estimate(2, 17, gradients=True, **kept)
        with pytest.raises(CaptureError, match="limit"), wb.capture([], gradients=True, limit=planned // 2):
            model(**GPT2.inputs())
    assert captured(model, GPT2.inputs(), queries_keys=False).nbytes == planned


def test_what_was_not_captured_says_so(model: nn.Module) -> None:
    with workbench.attach(model) as wb, wb.capture() as capture:
        model(**GPT2.inputs())
    assert capture[0].z_gradient is None
    with pytest.raises(CaptureError, match=r"key_gradient.*\n.*gradients=True"):
        _ = capture[0].key_gradient
    with pytest.raises(CaptureError, match='did you mean "key_gradient"'):
        _ = capture[0].key_gradients
