"""Weights that are kept elsewhere or in another form: offloaded, quantized, in tensors of several parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing

import workbench
from support.judges import judges, missing
from support.kept_elsewhere import Linear4bit, put
from workbench import CaptureError
from workbench.hooks.projections import projection_slices
from workbench.hooks.weights import kinds
from workbench.storage import weights as kept
from workbench.storage.weights import latest_hash, weights_hash, weights_stay

IDS = torch.arange(3, 27).view(2, 12)


def llama(scale: float = 1.0) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 99}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    model.model.layers[1].self_attn.q_proj.weight.data *= scale
    return model


def _to_disk(model: Any, folder: Path) -> Any:
    parts = ("embed_tokens", "rotary_emb", "layers.0", "norm")
    places = {f"model.{part}": "cpu" for part in parts} | {"model.layers.1": "disk", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


def _to_cpu(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _all_to_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def _one_block_to_cpu(model: Any, folder: Path) -> Any:
    accelerate.cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
    return model


OFFLOADS = [_to_disk, _to_cpu, _all_to_disk, _one_block_to_cpu]


@pytest.mark.parametrize("offload", OFFLOADS)
@torch.no_grad()
def test_an_offloaded_model_is_as_the_same_in_memory(offload: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    plain, model = llama(), offload(llama(), tmp_path)
    assert any(p.device.type == "meta" for p in model.parameters())
    want, found = [], []
    for each, into in ((plain, want), (model, found)):
        with workbench.attach(each) as wb:
            wb.verify(IDS).raise_if_failed()
            with wb.capture(z=True) as cap:
                logits = each(IDS).logits
            with wb.ablate((1, 2)):
                edited = each(IDS).logits
            assert wb.provenance()["weights_sha256"] == cap.provenance["weights_sha256"]
        results = [site.result() for site in cap]
        into.extend((logits, edited, cap.provenance["weights_sha256"], *results))
        cap.save(tmp_path / f"{len(want)}.safetensors")
    assert want[2] == found[2] is not None
    for a, b in zip(want, found, strict=True):
        assert a == b if isinstance(a, str) else torch.equal(a, b)


@torch.no_grad()
def test_the_hash_sees_offloaded_weights(tmp_path: Path) -> None:
    hashes = {weights_hash(_to_disk(llama(scale), tmp_path / str(scale))) for scale in (1.0, 2.0)}
    assert len(hashes) == 2
    assert None not in hashes


@torch.no_grad()
def test_weights_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True), "lost": nn.Linear(8, 8)}).eval()
    model["lost"].to("meta")
    model.forward = lambda x: model["attn"](x, x, x)[0]  # type: ignore[assignment]
    with workbench.attach(model) as wb, wb.capture(z=True) as cap:
        model(torch.randn(1, 5, 8))
    assert cap.provenance["weights_sha256"] is None
    assert "2 weights are offloaded" in cap.provenance["weights_note"]
    assert wb.weights_identity() != wb.weights_identity()  # nothing is taken up again by mistake
    with pytest.raises(CaptureError, match="offloaded"):
        projection_slices(model["lost"], 2, 4)


class Halves(Tensor):
    """A weight in two parts, as quantized tensors are: small numbers and a scale for each row."""

    small: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, small: Tensor, scale: Tensor) -> "Halves":
        return Tensor._make_wrapper_subclass(cls, small.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, small: Tensor, scale: Tensor) -> None:
        self.small, self.scale = small, scale

    @classmethod
    def of(cls, weight: Tensor) -> "Halves":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.small * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["small", "scale"], {}

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], settings: Any, size: Any, stride: Any) -> "Halves":
        return cls(**parts)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default):
            return return_and_correct_aliasing(func, args, kwargs or {}, cls(args[0].small, args[0].scale))
        plain = [arg.dequantize() if isinstance(arg, Halves) else arg for arg in args]
        if func is torch.ops.aten.t.default or func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return func(*plain, **(kwargs or {}))
        raise NotImplementedError(f"Halves does not know {func}")


class Sealed(Halves):
    """One that does not tell its numbers."""

    def dequantize(self) -> Tensor:
        raise NotImplementedError


def _wrap(model: Any, cls: type[Halves]) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(cls.of(module.weight.detach()), requires_grad=False)
    return model


def _check_quantized(model: Any, other: Any, folder: Path) -> None:
    """Captured, saved, told from another, and results are those of the dequantized weight."""
    with torch.no_grad(), workbench.attach(model) as wb:
        wb.verify(IDS).raise_if_failed()
        with wb.capture(z=True) as cap:
            model(IDS)
    cap.save(folder / "run.safetensors")
    assert any(" for float32" in kind for kind in cap.provenance["dtype"].split(", "))
    assert workbench.load_capture(folder / "run.safetensors").provenance["dtype"] == cap.provenance["dtype"]
    assert len(cap.provenance["weights_sha256"]) == 64
    assert cap.provenance["weights_sha256"] not in (weights_hash(other), None)
    projection = model.model.layers[1].self_attn.o_proj
    want = torch.einsum("bqhw,dhw->bqhd", cap["blocks.1.attn"].z, projection.weight.dequantize().unflatten(1, (4, 8)))
    torch.testing.assert_close(cap["blocks.1.attn"].result(), want, atol=1e-5, rtol=1e-5)


def test_tensors_of_several_parts(tmp_path: Path) -> None:
    _check_quantized(_wrap(llama(), Halves), _wrap(llama(2.0), Halves), tmp_path)


def test_a_weight_that_does_not_tell_its_numbers() -> None:
    module = nn.Linear(32, 32)
    module.weight = nn.Parameter(Sealed.of(module.weight.detach()), requires_grad=False)
    with pytest.raises(CaptureError, match=r"no matrix of floating-point numbers.*\n.*a Sealed"):
        projection_slices(module, 4, 8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@torch.no_grad()
def test_pytorchs_own_quantized_layers(tmp_path: Path) -> None:
    hashes = []
    for scale in (1.0, 2.0, 1.0):
        model = torch.ao.quantization.quantize_dynamic(llama(scale), {nn.Linear}, dtype=torch.qint8)
        with workbench.attach(model) as wb, wb.capture(z=True) as cap:
            model(IDS)
        cap.save(tmp_path / "run.safetensors")
        hashes.append(cap.provenance["weights_sha256"])
    assert hashes[0] == hashes[2] != hashes[1]
    assert cap.provenance["dtype"] == "float32, qint8"
    with pytest.raises(CaptureError):  # its projection is no nn.Linear
        cap["blocks.1.attn"].result()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Int8WeightOnlyConfig", "int8"),
        ("Float8WeightOnlyConfig", "float8_e4m3fn"),
        ("IntxWeightOnlyConfig", "int8"),
        ("IntxWeightOnlyConfig", "int4"),
    ],
)
def test_torchao(name: str, kind: str, tmp_path: Path) -> None:
    with judges():
        try:
            from torchao import quantization
        except ModuleNotFoundError as error:
            missing(error)
        models = []
        for scale in (1.0, 2.0):
            models.append(llama(scale))
            of_kind = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)} if kind == "int4" else {}
            quantization.quantize_(models[-1], getattr(quantization, name)(**of_kind))
        _check_quantized(*models, tmp_path)
    assert f"{kind} for float32" in kinds(models[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_blocks_of_four_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """As bitsandbytes keeps them, which needs a GPU: a column of bytes, that only the layer's own code understands."""
    hashes = []
    for scale in (1.0, 2.0):
        model = llama(scale).to(dtype)
        for layer in range(2):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                put(model, f"model.layers.{layer}.self_attn.{name}", Linear4bit)
        with workbench.attach(model) as wb:
            wb.verify(IDS).raise_if_failed()
            with wb.capture(z=True) as cap:
                model(IDS)
            assert workbench.singular_vectors(wb, "L0H1", circuit="ov").values.isfinite().all()
        hashes.append(cap.provenance["weights_sha256"])
    assert hashes[0] != hashes[1]
    cap.save(tmp_path / "run.safetensors")
    assert f"nf4 for {dtype}".replace("torch.", "") in cap.provenance["dtype"].split(", ")
    assert workbench.load_capture(tmp_path / "run.safetensors").provenance["dtype"] == cap.provenance["dtype"]
    site, projection = cap["blocks.1.attn"], model.model.layers[1].self_attn.o_proj
    want = projection(site.z.flatten(2)).float()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(site.result().sum(2).float(), want, atol=tolerance, rtol=tolerance)


class Packed(nn.Module):
    """A linear layer whose weights lie four to a number in a buffer, with scales, as those of GPTQ do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1) / 127
        rounded = (linear.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.register_buffer("qweight", rounded.view(torch.int32))
        self.register_buffer("scales", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.view(torch.int8).float() * self.scales[:, None], self.bias)


@torch.no_grad()
def test_weights_packed_into_buffers(tmp_path: Path) -> None:
    model = llama()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    with workbench.attach(model) as wb:
        wb.verify(IDS).raise_if_failed()
        with wb.capture(z=True) as cap:
            model(IDS)
    cap.save(tmp_path / "run.safetensors")
    assert workbench.load_capture(tmp_path / "run.safetensors").provenance["dtype"] == "float32, int32"
    assert cap.provenance["weights_sha256"] is not None
    with pytest.raises(CaptureError):  # its projection is no nn.Linear
        cap["blocks.1.attn"].result()


class Adapted(nn.Module):
    """A linear layer with a low-rank change beside it, as adapters wrap them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Served(nn.Module):
    """A model in a wrapper that hands on what it does not have, as those of runtimes do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return {"logits": self.inner(*args, **inputs).logits}


@torch.no_grad()
def test_a_model_in_a_wrapper_is_as_the_model() -> None:
    plain = llama()
    with workbench.attach(plain) as wb, wb.capture(z=True) as want:
        plain(IDS)
    model = Served(llama()).eval()
    with workbench.attach(model) as wb:
        wb.verify(IDS).raise_if_failed()
        with wb.capture(z=True) as cap:
            model(IDS)
    assert [site.name for site in cap.sites] == [f"inner.{site.name}" for site in want.sites]
    for one, other in zip(cap, want, strict=True):
        assert torch.equal(one.pattern.dense(), other.pattern.dense())
        assert torch.equal(one.result(), other.result())


@torch.no_grad()
def test_projections_with_an_adapter() -> None:
    """Queries and values are those that were used; an output projection that an adapter adds to gives no results."""
    model = llama()
    layers = [layer.self_attn for layer in model.model.layers]
    for module, name in ((layers[0], "o_proj"), *((module, "q_proj") for module in layers)):
        setattr(module, name, Adapted(getattr(module, name)).eval())
    merged = llama()
    for module, layer in zip(layers, merged.model.layers, strict=True):
        for name in ("q_proj", "o_proj"):
            if isinstance(one := getattr(module, name), Adapted):
                getattr(layer.self_attn, name).weight.copy_(one.base.weight + one.up.weight @ one.down.weight)
    with workbench.attach(merged) as wb, wb.capture(z=True) as want:
        merged(IDS)
    with workbench.attach(model) as wb:
        wb.verify(IDS).raise_if_failed()
        with wb.capture(z=True) as cap:
            model(IDS)
    for one, other in zip(cap, want, strict=True):
        torch.testing.assert_close(one.pattern.dense(), other.pattern.dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cap[1].result(), want[1].result(), atol=1e-5, rtol=1e-5)
    with pytest.raises(CaptureError, match=r"only a part of its projection[\s\S]*merge it into"):
        cap[0].result()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("shape", [(64, 64), (7, 3), (4093, 8), (130, 129)], ids=str)
def test_no_change_of_bytes_cancels_in_their_sums(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Signs are the highest bits, which cancel in pairs; powers of two add the same to each; orders add nothing."""
    torch.manual_seed(0)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
    weight = model.weight.data
    seen = {kept.weights_fingerprint(model)}
    changes = [
        lambda: weight.neg_(), lambda: weight.mul_(2), lambda: weight[:2].neg_(), lambda: weight[:, :2].neg_(),
        lambda: weight.copy_(weight.flip(0)), lambda: weight.copy_(weight.roll(1, 1)),
    ]  # fmt: skip
    for n, change in enumerate(changes, 2):
        change()
        seen.add(kept.weights_fingerprint(model))
        assert len(seen) == n


def test_sums_are_taken_once_where_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = llama(), []
    fingerprint = kept.weights_fingerprint
    monkeypatch.setattr(kept, "weights_fingerprint", lambda model: made.append(1) or fingerprint(model))
    weight = model.model.layers[0].self_attn.q_proj.weight
    with weights_stay(model):
        first = latest_hash(model)
        with weights_stay(model):
            assert latest_hash(model) == first == weights_hash(model)
        assert latest_hash(model) == first
        assert len(made) == 1
        with torch.no_grad():
            weight.mul_(2)  # its version counts it
        assert latest_hash(model) == weights_hash(model) != first
        assert len(made) == 2
    weight.data.mul_(2)  # no version counts it
    assert latest_hash(model) == weights_hash(model)
