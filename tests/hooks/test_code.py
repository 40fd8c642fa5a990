"""Sites are found in code: through processors, dispatch functions, tables of backends and methods of one class."""

import functools
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import workbench
import workbench.kernels.relative
from workbench import AttachError, CaptureError
from workbench.hooks.code import calls_attention
from workbench.hooks.finding import find_sites

D, H = 24, 4


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = H
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def split(self, x: Tensor) -> list[Tensor]:
        return list(self.qkv(x).unflatten(-1, (3, H, D // H)).permute(2, 0, 3, 1, 4).unbind(0))

    def join(self, z: Tensor) -> Tensor:
        return self.out(z.transpose(1, 2).flatten(2))


class Processor:
    def __call__(self, module: Projections, x: Tensor) -> Tensor:
        return module.join(dispatch(*module.split(x)))


class WrittenOutProcessor:
    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)

    def __call__(self, module: Projections, x: Tensor) -> Tensor:
        q, k, v = module.split(x)
        return module.join(self.weights(q, k) @ v)


def _native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _twice(function: Any) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Tensor) -> Tensor:
        return function(*args) * 2 / 2

    return wrapped


class Backends:
    table: ClassVar = {"native": _twice(_native)}


def dispatch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Backends.table["native"](q, k, v)


class WithProcessor(Projections):
    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


class Functional(Projections):
    def forward(self, x: Tensor) -> Tensor:
        return self.native(x.transpose(0, 1)).transpose(0, 1)

    def native(self, x: Tensor) -> Tensor:
        given = (self.qkv.weight, self.qkv.bias, None, None, False, 0.0, self.out.weight, self.out.bias)
        return F.multi_head_attention_forward(x, x, x, D, H, *given, need_weights=False)[0]


class AcrossMethods(Projections):
    def weights(self, scores: Tensor) -> Tensor:
        return nn.Softmax(dim=-1)(scores)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.join(torch.matmul(self.weights(torch.matmul(q, k.mT)), v))


class WithFunction(Projections):
    def __init__(self) -> None:
        super().__init__()
        self.attend = functools.partial(_native)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.attend(*self.split(x)))


class Inheriting(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Renamed(Projections):
    def forward(self, x: Tensor) -> Tensor:
        return self.join(sdpa(*self.split(x)))


class Carrying(Projections):
    def __init__(self) -> None:
        super().__init__()
        self.attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.attend(*self.split(x)))


class Swapped(nn.Module):
    """Its processor is exchanged for one that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = lambda module, x: x

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


MODULES = [
    WithProcessor(Processor()), WithProcessor(WrittenOutProcessor()), Functional(), AcrossMethods(), WithFunction(),
    Inheriting(), Renamed(), Carrying(),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
@torch.no_grad()
def test_a_plain_attach_knows_the_sites_before_anything_runs(module: nn.Module) -> None:
    model, x = nn.ModuleDict({"attn": module}).eval(), torch.randn(2, 7, D)
    model.forward = lambda x: module(x)  # type: ignore[assignment]
    with workbench.attach(model) as wb:
        assert [(site.name, site.n_heads) for site in wb.sites] == [("attn", H)]
        verification = wb.verify(x).raise_if_failed()
        with wb.capture() as cap:
            model(x)
    assert len(verification.checks) == 1
    assert cap["attn"].shape == (2, H, 7, 7)


def test_what_is_no_attention_is_no_site() -> None:
    assert not calls_attention(Swapped())
    assert calls_attention(WithProcessor(Processor()))
    assert not calls_attention(WithProcessor(lambda module, x: x))  # the class is that of one that is
    other = Carrying()
    other.attend = torch.relu
    assert not calls_attention(other)
    with pytest.raises(AttachError, match="no attention"):
        workbench.attach(nn.Sequential(Swapped()))


def test_a_softmax_in_another_method_counts_only_where_nothing_else_is_found() -> None:
    assert [site.name for site in find_sites(nn.Sequential(AcrossMethods(), Functional()))] == ["1"]


@torch.no_grad()
def test_wavlm_and_layoutlmv3() -> None:
    speech = transformers.WavLMModel(
        transformers.WavLMConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, conv_dim=[16, 16],
            conv_stride=[5, 4], conv_kernel=[10, 8], num_feat_extract_layers=2, num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
        )
    ).eval()  # fmt: skip
    page = transformers.LayoutLMv3Model(
        transformers.LayoutLMv3Config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
            visual_embed=False, coordinate_size=5, shape_size=6, max_position_embeddings=40,
            max_2d_position_embeddings=20,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(3, 99, (2, 30))
    for model, inputs in ((speech, {"input_values": torch.randn(1, 1600)}), (page, {"input_ids": ids})):
        with workbench.attach(model) as wb:
            assert [site.n_heads for site in wb.sites] == [4, 4]
            wb.verify(**inputs).raise_if_failed()


class Scriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 72)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.size(0), x.size(1), 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        z = F.scaled_dot_product_attention(q, k, v)
        return z.transpose(1, 2).reshape(x.size(0), x.size(1), 24)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
class TestTorchScript:
    @torch.no_grad()
    def test_parts_without_attention_are_no_matter(self) -> None:
        x = torch.randn(2, 5, 24)
        for part in (torch.jit.script(nn.LayerNorm(24)), torch.jit.trace(nn.Linear(24, 24), x)):
            model = nn.Sequential(Scriptable(), part).eval()
            with workbench.attach(model) as wb:
                wb.verify(x).raise_if_failed()

    @torch.no_grad()
    def test_parts_with_attention_are_named(self) -> None:
        x = torch.randn(2, 5, 24)
        model = nn.Sequential(Scriptable(), torch.jit.script(Scriptable()), torch.jit.trace(Scriptable(), x)).eval()
        with pytest.warns(UserWarning, match="TorchScript cannot be seen, and is no site: 1, 2"):
            wb = workbench.attach(model)
        with wb:
            assert [one.name for one in wb.sites.unread] == ["1", "2"]
            verification = wb.verify(x).raise_if_failed()
            with wb.capture() as cap:
                model(x)
        assert [site.name for site in cap.sites] == ["0"]
        assert not verification.complete
        assert [one.name for one in verification.unread] == ["", "1", "2"]  # what they mix shows in what holds them

    def test_a_whole_model(self) -> None:
        model = torch.jit.script(Scriptable())
        with pytest.warns(UserWarning, match="the model itself"):
            wb = workbench.attach(model)
        assert len(wb.sites) == 0
        with wb, pytest.raises(CaptureError, match="no attention call was seen"), wb.capture():
            model(torch.randn(1, 5, 24))


def test_a_method_in_the_place_of_another_package_s_is_followed() -> None:
    base = type("Base", (nn.Module,), {"forward": _base_forward, "mix": _base_mix, "__module__": "elsewhere.models"})

    class Attends(base):  # type: ignore[misc, valid-type]
        def mix(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    assert calls_attention(Attends())
    assert not calls_attention(base())


def test_a_name_of_an_attention_function_is_one_where_a_module_has_it() -> None:
    """DeBERTa's encoder has an attribute `relative_attention`, which says how positions are told."""

    class Says(nn.Module):
        relative_attention = True

        def forward(self, x: Tensor) -> Tensor:
            return x + self.relative_attention

    class Imports(nn.Module):
        def forward(self, x: Tensor) -> Any:
            from workbench.kernels.relative import relative_attention as mixed

            return mixed(x, x, x)

    class Reaches(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return workbench.kernels.relative.relative_attention(x, x, x)

    class Carries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed = workbench.kernels.relative.relative_attention

        def forward(self, x: Tensor) -> Any:
            return self.mixed(x, x, x)

    assert not calls_attention(Says())
    assert all(calls_attention(module()) for module in (Imports, Reaches, Carries))


def _elsewhere(function: Any) -> Any:
    function.__module__ = "elsewhere.models"
    return function


@_elsewhere
def _base_forward(self: Any, x: Tensor) -> Tensor:
    return self.mix(x)


@_elsewhere
def _base_mix(self: Any, x: Tensor) -> Tensor:
    return x
