"""Delta rules, lightning attention, RG-LRU, short convolutions and RWKV: what is read gives back what they gave."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import workbench
from support.reading import assert_true, calls_of, drawn, tokens
from support.tiny import VOCABULARY
from workbench.errors import CaptureError
from workbench.hooks.readers import reader_of
from workbench.kernels.recurrent import naive_recurrent_pattern

COMMON = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
ATTENTION = {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
DELTA = {
    "linear_key_head_dim": 6, "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
EXPERTS = {
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "moe_intermediate_size": 16,
    "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "dense"], "n_group": 1, "topk_group": 1, "intermediate_size": 24,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


def _recurrent_gemma() -> nn.Module:
    layers = COMMON | {"num_hidden_layers": 3}
    return hf.RecurrentGemmaModel(
        hf.RecurrentGemmaConfig(**layers, **ATTENTION, lru_width=16, attention_window_size=8, head_dim=4)
    )


def _xlstm_config(**more: object) -> hf.xLSTMConfig:
    """Its cache fits only sizes that are multiples of 64."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 16, "vocab_size": VOCABULARY}
    return hf.xLSTMConfig(**sizes, pad_token_id=0, autocast_kernel_dtype="float32", **more)


def _xlstm() -> nn.Module:
    return hf.xLSTMModel(_xlstm_config())


# How to build it; its kernel, number of mixers, and (head, width) of their maps.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, int, tuple[int, int]]] = {
    "qwen3-next": (
        lambda: hf.Qwen3NextModel(hf.Qwen3NextConfig(**COMMON, **ATTENTION, **DELTA, **EXPERTS, head_dim=4)),
        "gated_delta", 1, (4, 4)),
    "qwen3.5": (
        lambda: hf.Qwen3_5TextModel(hf.Qwen3_5TextConfig(**COMMON, **ATTENTION, **DELTA, head_dim=4)),
        "gated_delta", 1, (4, 4)),
    "qwen3.5-moe": (
        lambda: hf.Qwen3_5MoeTextModel(hf.Qwen3_5MoeTextConfig(
            **COMMON, **ATTENTION, **DELTA, **EXPERTS, head_dim=4)),
        "gated_delta", 1, (4, 4)),
    "olmo-hybrid": (
        lambda: hf.OlmoHybridModel(hf.OlmoHybridConfig(**COMMON, **ATTENTION, **DELTA)), "gated_delta", 1, (4, 4)),
    "olmo-hybrid-negative": (
        lambda: hf.OlmoHybridModel(hf.OlmoHybridConfig(
            **COMMON, **ATTENTION, **DELTA, linear_allow_neg_eigval=True)),
        "gated_delta", 1, (4, 4)),
    "kimi-linear": (
        lambda: hf.KimiLinearModel(hf.KimiLinearConfig(
            **COMMON, **LATENT, linear_head_dim=6, linear_num_heads=3)),
        "kimi_delta", 1, (3, 6)),
    "bailing": (
        lambda: hf.BailingHybridModel(hf.BailingHybridConfig(**COMMON, **LATENT, head_dim=4)),
        "kimi_delta", 1, (4, 4)),
    "minimax": (
        lambda: hf.MiniMaxModel(hf.MiniMaxConfig(
            **COMMON, **ATTENTION, head_dim=4, num_local_experts=2, block_size=6,
            layer_types=["linear_attention", "full_attention"])),
        "lightning", 1, (4, 4)),
    "recurrent-gemma": (_recurrent_gemma, "rg_lru", 2, (16, 1)),
    "lfm2": (
        lambda: hf.Lfm2Model(hf.Lfm2Config(**COMMON, **ATTENTION, layer_types=["conv", "full_attention"])),
        "short_conv", 1, (16, 1)),
    "lfm2-bias": (
        lambda: hf.Lfm2Model(hf.Lfm2Config(
            **COMMON, **ATTENTION, layer_types=["conv", "full_attention"], conv_bias=True)),
        "short_conv", 1, (16, 1)),
    "lfm2-moe": (
        lambda: hf.Lfm2MoeModel(hf.Lfm2MoeConfig(
            **COMMON, **ATTENTION, layer_types=["conv", "full_attention"], num_experts=2, num_experts_per_tok=1,
            moe_intermediate_size=16, num_dense_layers=1)),
        "short_conv", 1, (16, 1)),
    "xlstm": (_xlstm, "mlstm", 2, (4, 32)),
    "rwkv": (
        lambda: hf.RwkvModel(hf.RwkvConfig(**COMMON, attention_hidden_size=16, intermediate_size=32)),
        "rwkv", 2, (16, 1)),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", MODELS)
PADDED = [name for name in MODELS if name not in ("rwkv", "recurrent-gemma", "xlstm")]  # these know of no padding


def build(name: str) -> nn.Module:
    """The model with every parameter drawn at random; its experts on code that knows of float64."""
    model = drawn(MODELS[name][0])
    if any("Experts" in type(module).__name__ for module in model.modules()):
        model.set_experts_implementation("eager")
    return model


@EACH
@pytest.mark.parametrize("n", [1, 19, 70])
@torch.no_grad()
def test_the_map_gives_back_what_the_module_gave(name: str, n: int):
    _, kernel, count, (heads, width) = MODELS[name]
    model = build(name)
    with calls_of(model) as calls:
        model(input_ids=tokens(n), use_cache=False)
    assert len(calls) == count
    for call in calls:
        assert (call.kernel, call.tap, call.is_causal) == (kernel, "reader", True)
        pattern = call.pattern()
        assert pattern.shape == (2, heads, n, n)
        assert call.v.shape == pattern.values.shape == (2, heads, n, width)
        assert_true(call, 1e-5)


@pytest.mark.parametrize("name", ["minimax", "lfm2"])
@torch.no_grad()
def test_float64_modules_are_met_to_1e_10(name: str):
    """The others round to float32 inside, whatever their dtype."""
    model = build(name).double()
    for module in model.modules():
        if hasattr(module, "slope_rate"):  # constants that were made in float32, each by itself
            factors = module.decay_factors(module.slope_rate)
            module.query_decay, module.key_decay, module.diagonal_decay = factors
    with calls_of(model) as calls:
        model(input_ids=tokens(), use_cache=False)
    for call in calls:
        assert call.output.dtype == torch.float64
        assert_true(call, 1e-10)


@EACH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
@torch.no_grad()
def test_other_dtypes(name: str, dtype: torch.dtype, tolerance: float):
    if name == "xlstm" and dtype != torch.float64:
        pytest.skip("its own kernels multiply float32 states with queries in half precision, which is an error")
    if name == "recurrent-gemma" and dtype == torch.bfloat16:
        tolerance = 0.1  # its gates are rounded to bfloat16 before they are multiplied
    model = build(name).to(dtype)
    with calls_of(model) as calls:
        model(input_ids=tokens(), use_cache=False)
    for call in calls:
        assert call.output.dtype == dtype
        assert_true(call, tolerance)


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("side", ["left", "right", "inside"])
@torch.no_grad()
def test_padding(name: str, side: str):
    model, ids = build(name), tokens()
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(0, 4), "right": slice(-4, None), "inside": slice(6, 10)}[side]] = 0
    with calls_of(model) as calls:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for call in calls:
        assert_true(call, 1e-5)
        if side == "left" and name != "lfm2-bias":  # padding is neither read nor written
            whole = call.pattern().dense()
            assert bool((whole[0, ..., :4] == 0).all())
            assert bool((whole[0, :, 4:, 4:].diagonal(dim1=-2, dim2=-1) != 0).any())


@EACH
@torch.no_grad()
def test_what_goes_on_from_a_state_is_read_with_what_its_rows_read_of_that(name: str):
    """A prompt, one position, and several at once; only RWKV's state is not read, and is refused."""
    model, ids = build(name), tokens(24)
    # RecurrentGemma keeps its states in its blocks, and only while it is given a cache for its attention.
    given = {"past_key_values": hf.DynamicCache(config=model.config)} if name == "recurrent-gemma" else {}
    with calls_of(model) as calls:
        output = model(input_ids=ids[:, :19], use_cache=True, **given)
    assert all(call.state.found is None and call.pattern().before is None for call in calls)
    names = ("cache_params", "past_key_values", "state")
    cache = given | {key: output[key] for key in names if output.get(key) is not None}
    if name == "rwkv":
        with calls_of(model), pytest.raises(CaptureError, match="goes on from a cached state") as caught:
            model(input_ids=ids[:, :1], use_cache=True, **cache)
        assert caught.value.site == calls[0].site
    several = (20, 21) if name == "recurrent-gemma" else (20, 24)  # that model forgets at several positions
    for start, stop in () if name == "rwkv" else ((19, 20), several):
        before = [call.state.left for call in calls]
        at = {"position_ids": torch.arange(start, stop).expand(2, -1)} if name == "recurrent-gemma" else {}
        with calls_of(model) as calls:
            model(input_ids=ids[:, start:stop], use_cache=True, **cache, **at)
        assert [call.state.found for call in calls] == before
        for call in calls:
            assert call.pattern().shape[2:] == (stop - start, stop - start)
            assert_true(call, 1e-5)
            assert bool((call.pattern().before != 0).any())
    with calls_of(model) as again:  # a new sequence, also where the module has kept a state
        model(input_ids=ids, use_cache=True)
    assert all(call.state.found is None for call in again)
    assert_true(again[0], 1e-5)


@torch.no_grad()
def test_an_mlstm_with_fused_projections_and_a_given_state():
    """The model of transformers cannot be built with these; its layer can."""
    config = _xlstm_config(weight_mode="fused", use_bias=True)
    layer = drawn(lambda: hf.models.xlstm.modeling_xlstm.xLSTMLayer(config))
    x = torch.randn(2, 21, 128, generator=torch.Generator().manual_seed(0))
    with calls_of(layer) as calls:
        _, state = layer(x[:, :17])
        layer(x[:, 17:], state=state)
        layer(x)
    first, later, whole = calls
    for call in calls:
        assert_true(call, 1e-5)
    assert later.state.found == first.state.left
    torch.testing.assert_close(later.mixed, whole.mixed[:, :, 17:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_positions_that_begin_again_reset_a_recurrent_block():
    model = build("recurrent-gemma")
    at = torch.cat((torch.arange(8), torch.arange(11)))[None].expand(2, -1)
    with calls_of(model) as calls:
        model(input_ids=tokens(), position_ids=at, use_cache=False)
    for call in calls:
        assert_true(call, 1e-5)
        assert bool((call.pattern().dense()[..., 8:, :8] == 0).all())


@pytest.mark.parametrize("name", ["qwen3-next", "kimi-linear"])
@torch.no_grad()
def test_the_map_of_a_delta_rule_is_that_of_its_definition(name: str):
    model = build(name)
    with calls_of(model) as calls:
        model(input_ids=tokens(70), use_cache=False)
    pattern = calls[0].pattern()
    q, k = (t.double().repeat_interleave(pattern.n_heads // t.shape[1], dim=1) for t in (pattern.q, pattern.k))
    want = naive_recurrent_pattern(q, k, pattern.log_decay.double(), pattern.beta.double())
    torch.testing.assert_close(pattern.dense().double(), want, atol=1e-5, rtol=1e-5)


@EACH
@torch.no_grad()
def test_the_model_is_left_as_it_was(name: str):
    model = build(name)
    bare = model(input_ids=tokens(), use_cache=False)[0]
    with calls_of(model) as calls:
        observed = model(input_ids=tokens(), use_cache=False)[0]
    assert calls
    assert torch.equal(bare, observed)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "lfm2-moe"])
def test_gradients_flow_through_what_follows_the_map(name: str):
    model = build(name)
    with calls_of(model) as calls:
        model(input_ids=tokens(), use_cache=False)
    call = calls[0]
    z = call.pattern().apply(call.v).detach().requires_grad_()
    call.finish(z).sum().backward()
    assert bool((z.grad != 0).any())


@pytest.mark.parametrize(
    ("name", "part"),
    [("qwen3-next", "key_dim"), ("kimi-linear", "qkv_dim"), ("minimax", "num_attention_heads"),
     ("recurrent-gemma", "act_fn"), ("rwkv", "value"), ("xlstm", "k")],
)  # fmt: skip
@torch.no_grad()
def test_modules_of_another_release_are_refused_by_name(name: str, part: str):
    """Those that lack a part, and those that have all parts and compute something else."""
    model, ids = build(name), tokens()
    module = next(module for module in model.modules() if reader_of(module))
    cls = type(module)

    @functools.wraps(cls.forward)
    def doubled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = cls.forward(self, *args, **kwargs)
        return 2 * output if isinstance(output, torch.Tensor) else (2 * output[0], *output[1:])

    module.__class__ = type(cls.__name__, (cls,), {"forward": doubled})
    with (
        workbench.attach(model) as wb,
        pytest.raises(CaptureError, match=f"the reader of {type(module).__name__} gives is not what"),
        wb.capture([]),
    ):
        model(input_ids=ids, use_cache=False)
    module.__class__ = cls
    module.register_forward_hook(lambda module, args, output: delattr(module, part))
    with (
        calls_of(model),
        pytest.raises(
            CaptureError, match=r"not built as those that its reader knows: AttributeError(?s:.*)another release"
        ),
    ):
        model(input_ids=ids, use_cache=False)


@pytest.mark.parametrize(
    ("name", "part", "other"),
    [("qwen3-next", "key_dim", 5), ("kimi-linear", "qkv_dim", 5), ("minimax", "num_attention_heads", 3),
     ("recurrent-gemma", "rg_lru", None), ("lfm2", "in_proj", None), ("xlstm", "q", None)],
)  # fmt: skip
@torch.no_grad()
def test_parts_of_another_size_or_kind_are_refused_by_name(name: str, part: str, other: Any):
    """Whatever goes wrong in a reader is no error of the model's."""
    model = build(name)
    module = next(module for module in model.modules() if reader_of(module))
    module.register_forward_hook(lambda module, args, output: setattr(module, part, other))
    with calls_of(model), pytest.raises(CaptureError, match="not built as those that its reader knows") as caught:
        model(input_ids=tokens(), use_cache=False)
    assert type(module).__name__ in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3-next", "kimi-linear", "minimax", "lfm2", "rwkv"])
@torch.no_grad()
def test_inputs_of_another_name_are_refused_by_name(name: str):
    module = next(module for module in build(name).modules() if reader_of(module))
    cls = type(module)

    def forward(self: nn.Module, states: torch.Tensor) -> Any:
        given = {"position_embeddings": None, "attention_mask": None} if name == "minimax" else {}
        return cls.forward(self, states, **given)

    module.__class__ = type(cls.__name__, (cls,), {"forward": forward})
    with calls_of(module), pytest.raises(CaptureError, match=f"this {cls.__name__} is not built as(?s:.*)KeyError"):
        module(torch.randn(2, 9, 16))


@pytest.mark.parametrize("name", ["qwen3-next", "kimi-linear", "minimax", "recurrent-gemma", "lfm2", "rwkv", "xlstm"])
def test_other_classes_of_the_same_name_are_none(name: str):
    module = next(module for module in build(name).modules() if reader_of(module))
    other = type(type(module).__name__, (nn.Module,), {})()
    assert reader_of(other) is None
