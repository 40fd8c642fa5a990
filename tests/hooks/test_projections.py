"""Output projections are found in every family, and each head's result adds up to what the projection gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import workbench
from support.tiny import FAMILIES, Family, decoder_inputs, family, make
from workbench import Capture, CaptureError
from workbench.hooks.projections import projection_slices

BY_NAME = {family.name: family for family in FAMILIES}
ONE_TOWER = {"attentions": ("", "self")}


FALCON, BLOOM = family("falcon"), family("bloom")
NAMES = {  # of the last site's projection; None where it differs between releases
    "gpt2": "transformer.h.1.attn.c_proj",
    "llama-gqa": "model.layers.1.self_attn.o_proj",
    "bert": "encoder.layer.1.attention.output.dense",
    "vit": None,
    "t5": "decoder.block.1.layer.1.EncDecAttention.o",
    "bart": "model.decoder.layers.1.encoder_attn.out_proj",
    "whisper": "model.decoder.layers.1.encoder_attn.out_proj",
    "falcon": "transformer.h.1.self_attention.dense",
    "bloom": "transformer.h.1.self_attention.dense",
}


def capture_of(model: nn.Module, *args: Any, **inputs: Any) -> Capture:
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture([], z=True) as capture:
        model(*args, **inputs)
    return capture


def outputs_of(model: nn.Module, names: list[str], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What the named modules give."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, output, name=name: seen.update({name: output}))
        for name in names
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "family", [BY_NAME.get(name, {"falcon": FALCON, "bloom": BLOOM}.get(name)) for name in NAMES], ids=lambda f: f.name
)
def test_results_add_up_to_the_projections_output(family: Family) -> None:
    model, inputs = make(family), family.inputs()
    capture = capture_of(model, **inputs)
    names = [site.projection.name for site in capture]
    if NAMES[family.name] is not None:
        assert names[-1] == NAMES[family.name]
    want = outputs_of(model, names, inputs)
    assert len(want) == len(names) >= 2
    for site in capture:
        module = site.projection.module
        result = site.result()
        bias = 0.0 if module.bias is None else module.bias
        assert result.shape == (*site.z.shape[:3], want[site.projection.name].shape[-1])
        got = result.sum(2) + bias
        torch.testing.assert_close(got, want[site.projection.name].reshape(got.shape), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
def test_pytorchs_own_attention(mode: type) -> None:
    """Its projection is applied without its module being called; in inference the whole is one operator."""
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(16, 4, batch_first=True).eval(), torch.randn(2, 5, 16)
    nn.init.normal_(model.out_proj.bias)
    with mode(), workbench.attach(model) as wb, wb.capture([], z=True) as capture:
        want = model(x, x, x)[0]
    site = capture.sites[0]
    assert capture[site].projection.name == "out_proj"
    torch.testing.assert_close(capture[site].result().sum(2) + model.out_proj.bias, want)


@torch.no_grad()
def test_pytorchs_own_layer_on_its_native_path() -> None:
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    site = capture_of(model, x)["self_attn"]
    assert site.kernel == "transformer_encoder_layer_fwd"
    assert site.projection.name == "self_attn.out_proj"
    want = model.self_attn(x, x, x)[0]
    torch.testing.assert_close(site.result().sum(2) + model.self_attn.out_proj.bias, want)


def test_some_heads_only_and_the_limit() -> None:
    site = capture_of(make(BY_NAME["gpt2"]), **decoder_inputs())[0]
    whole = site.result()
    assert torch.equal(site.result([2, -1]), whole[:, :, [2, 3]])
    assert torch.equal(site.result(1), whole[:, :, 1:2])
    assert whole.nbytes == 2 * 17 * 4 * 32 * 4
    assert site.result([0], limit=whole.nbytes // 4).shape == (2, 17, 1, 32)
    with pytest.raises(CaptureError, match=f"would take {whole.nbytes:,} bytes"):
        site.result(limit=whole.nbytes - 1)
    with pytest.raises(CaptureError, match="4 heads, no head 4"):
        site.result([4])


def test_half_precision_is_multiplied_in_float32() -> None:
    site = capture_of(make(BY_NAME["gpt2"]).bfloat16(), **decoder_inputs())[0]
    want = torch.einsum("bqhw,hwd->bqhd", site.z.float(), projection_slices(site.projection.module, 4, 8).float())
    assert torch.equal(site.result(), want)


class Attention(nn.Module):
    """Attention with something between the heads and the projection."""

    def __init__(self, between: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.num_heads = 4
        self.qkv, self.gate, self.o = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        z = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.between == "gate":
            z = z * self.gate(x).sigmoid()
        elif self.between == "gate in place":
            z.mul_(self.gate(x).sigmoid())
        elif self.between == "signed gate":
            z = z * self.gate(x).tanh()
        elif self.between == "wide gate":
            z = z * 2 * self.gate(x).sigmoid()
        elif self.between == "norm":
            z = self.norm(z)
        elif self.between == "another order":
            z = z.unflatten(-1, (4, 4)).transpose(-1, -2).flatten(2)
        elif self.between == "flat":
            return self.o(z.flatten(0, 1)).view(x.shape)
        elif self.between == "positions first":
            return self.o(z.transpose(0, 1)).transpose(0, 1)
        return self.o(z)


class Model(nn.Module):
    def __init__(self, between: str) -> None:
        super().__init__()
        self.attn = Attention(between)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


@pytest.mark.parametrize("between", ["nothing", "flat", "positions first"])
def test_shapes_in_which_heads_arrive(between: str) -> None:
    model, x = Model(between), torch.randn(2, 5, 16)
    site = capture_of(model, x)[0]
    torch.testing.assert_close(site.result().sum(2) + model.attn.o.bias, model(x))


@pytest.mark.parametrize("between", ["gate", "gate in place"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_behind_a_gate_it_is_what_enters_that_is_projected(between: str, mode: type) -> None:
    """In every forward, with an edited head too; z stays what the heads give."""
    model, entered = Model(between), []
    handle = model.attn.o.register_forward_pre_hook(lambda _, args: entered.append(args[0].clone()))
    with workbench.attach(model) as wb, mode():
        with wb.capture([], z=True) as cap:
            made = [model(torch.randn(2, 5, 16)) for _ in range(2)]
        with wb.ablate({("attn", 1)}), wb.capture([], z=True) as edited:
            model(torch.randn(2, 5, 16))
    handle.remove()
    for forward, given, y in zip(cap.forwards, entered[:2], made, strict=True):
        site = forward.sites["attn"]
        assert torch.equal(site.entering.flatten(2), given)
        assert not torch.equal(site.entering, site.z)
        torch.testing.assert_close(site.result().sum(2) + model.attn.o.bias, y)
    assert bool((edited[0].result(1) == 0).all())
    assert float(edited[0].result([0, 2, 3]).abs().min()) > 0


def test_a_module_with_a_gate_can_be_the_model_itself() -> None:
    model, x = Attention("gate"), torch.randn(2, 5, 16)
    torch.testing.assert_close(capture_of(model, x)[0].result().sum(2) + model.o.bias, model(x))


@pytest.mark.parametrize("between", ["nothing", "gate", "norm"])
def test_heads_that_are_all_switched_off_prove_no_projection(between: str) -> None:
    """A gate and a norm leave zeros as they are, and what comes next is not zero."""
    model, x = Model(between), torch.randn(2, 5, 16)
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture([], z=True) as cap:
        with wb.ablate({("attn", head) for head in range(4)}):
            model(x)
        y = model(x)
    off, on = (one[0] for one in cap.calls)
    assert not off.has_result or not bool(off.result().any())
    assert on.has_result == (between != "norm")
    if on.has_result:
        torch.testing.assert_close(on.result().sum(2) + model.attn.o.bias, y)


def test_forwards_with_and_without_a_gate_have_no_result_together() -> None:
    model, x = Model("gate"), torch.randn(2, 5, 16)
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture([], z=True) as cap:
        model(x)
        model.attn.between = "norm"
        model(x)
    assert [one[0].has_result for one in cap.calls] == [True, False]
    assert not cap.pool()[0].has_result


@pytest.mark.parametrize("between", ["norm", "another order", "signed gate", "wide gate"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_something_between_is_said(between: str, mode: type) -> None:
    model = Model(between)
    with workbench.attach(model) as wb, mode(), wb.capture([], z=True) as capture:
        model(torch.randn(2, 5, 16))
    assert not capture[0].has_result
    with pytest.raises(CaptureError, match=r"projection of the site is not known \(site attn\)") as caught:
        capture[0].result()
    assert "gate" in str(caught.value)


def test_a_result_needs_z() -> None:
    model = make(BY_NAME["gpt2"])
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture() as capture:
        model(**decoder_inputs())
    with pytest.raises(CaptureError, match=r"\n.*z=True"):
        capture[0].result()


def test_a_weight_that_changed_since() -> None:
    model = make(BY_NAME["gpt2"])
    capture = capture_of(model, **decoder_inputs())
    before = capture[1].result()
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.mul_(2)
    with pytest.raises(CaptureError, match="changed since the capture"):
        capture[0].result()
    assert torch.equal(capture[1].result(), before)


class Adapted(nn.Module):
    """A projection with something beside it."""

    def __init__(self, base: nn.Linear, how: str) -> None:
        super().__init__()
        self.how = how
        setattr(self, "base_layer" if how == "scaled" else "base", base)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "behind":
                return self.base(x) + self.up(self.down(x))
            case "before":
                return self.up(self.down(x)) + self.base(x)
            case "reshaped":
                return self.base(x) + self.up(self.down(x.flatten(0, 1))).view(x.shape)
            case "functions":
                return self.base(x) + (x @ self.down.weight.T) @ self.up.weight.T
            case "gate":
                return self.base(x) * F.linear(x, self.down.weight).sum(-1, keepdim=True).sigmoid()
        return self.base_layer(x) * 2


@pytest.mark.parametrize("how", ["behind", "before", "reshaped", "functions", "gate", "scaled"])
def test_an_adapter_is_not_taken_for_the_projection(how: str) -> None:
    model = Model("nothing")
    model.attn.o = Adapted(model.attn.o, how)
    site = capture_of(model, torch.randn(2, 5, 16))[0]
    with pytest.raises(CaptureError, match=r"a part of its projection: .*\(site attn\)"):
        site.result()


def test_weights_that_cannot_be_cut() -> None:
    with pytest.raises(CaptureError, match="other inputs"):
        projection_slices(nn.Linear(6, 4), n_heads=2, width=2)
    quantized = nn.Linear(6, 4)
    quantized.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(CaptureError, match="quantized"):
        projection_slices(quantized, n_heads=3, width=2)


def test_a_file_holds_results_only_when_asked(tmp_path: Path) -> None:
    model = make(BY_NAME["gpt2"])
    capture = capture_of(model, **decoder_inputs())
    with_results = workbench.load_capture(capture.save(tmp_path / "a", result=True))
    without = workbench.load_capture(capture.save(tmp_path / "b"))
    torch.testing.assert_close(with_results[1].result([3, 0]), capture[1].result([3, 0]))
    assert torch.equal(without[1].z, capture[1].z)
    with pytest.raises(CaptureError, match=r"not known[\s\S]*result=True"):
        without[1].result()
    torch.testing.assert_close(with_results.pool()[1].result(), capture[1].result())


def test_a_module_that_runs_twice_has_one_projection() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention("nothing")

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(self.attn(x))

    model, x = Twice(), torch.randn(2, 5, 16)
    capture = capture_of(model, x)
    assert [site.site.name for site in capture] == ["attn", "attn#1"]
    torch.testing.assert_close(capture["attn#1"].result().sum(2) + model.attn.o.bias, model(x))
