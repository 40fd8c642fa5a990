"""State-space mixers of transformers: what is read from their inputs gives back exactly what they gave."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from support.reading import assert_true, calls_of, drawn, tokens
from support.tiny import VOCABULARY
from workbench.errors import CaptureError
from workbench.hooks.readers import continues, read_module, reader_of
from workbench.hooks.tap import Unshown
from workbench.kernels.statistics import dense

COMMON = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
ATTENTION = {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_chunk_size": 8}


def _mamba() -> nn.Module:
    return hf.MambaModel(hf.MambaConfig(**COMMON, state_size=5, time_step_rank=3))


def _falcon_mamba() -> nn.Module:
    return hf.FalconMambaModel(hf.FalconMambaConfig(**COMMON, state_size=5, time_step_rank=3))


def _jamba() -> nn.Module:
    return hf.JambaModel(
        hf.JambaConfig(
            **COMMON, **ATTENTION, attn_layer_period=2, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1,
            expert_layer_period=2, mamba_d_state=5, mamba_dt_rank=3,
        )
    )  # fmt: skip


def _zamba() -> nn.Module:
    return hf.ZambaModel(
        hf.ZambaConfig(
            **(COMMON | {"num_hidden_layers": 3}), **ATTENTION, attention_hidden_size=32, mamba_d_state=5,
            mamba_dt_rank=3, n_mamba_heads=2, layers_block_type=["linear_attention", "hybrid", "hybrid"],
        )
    )  # fmt: skip


def _mamba2() -> nn.Module:
    return hf.Mamba2Model(
        hf.Mamba2Config(
            **COMMON, num_heads=4, head_dim=8, n_groups=2, state_size=5, chunk_size=8, time_step_limit=(0.02, 0.9)
        )
    )


def _bamba() -> nn.Module:
    return hf.BambaModel(hf.BambaConfig(**COMMON, **ATTENTION, **HEADS, attn_layer_indices=[1]))


def _falcon_h1() -> nn.Module:
    multipliers = {"ssm_in_multiplier": 0.7, "ssm_multipliers": [0.5, 1.5, 0.8, 1.2, 0.9]}
    return hf.FalconH1Model(hf.FalconH1Config(**COMMON, **ATTENTION, **HEADS, mamba_d_ssm=32, **multipliers))


def _falcon_h1_with_norm() -> nn.Module:
    config = hf.FalconH1Config(**COMMON, **ATTENTION, **HEADS, mamba_d_ssm=32, mamba_rms_norm=True)
    return hf.FalconH1Model(config)


def _zamba2() -> nn.Module:
    return hf.Zamba2Model(
        hf.Zamba2Config(
            **COMMON, **ATTENTION, attention_hidden_size=32, attention_head_dim=8, n_mamba_heads=4, mamba_headdim=8,
            mamba_ngroups=2, mamba_d_state=5, chunk_size=8, layers_block_type=["mamba", "hybrid"], num_mem_blocks=1,
        )
    )  # fmt: skip


def _granite() -> nn.Module:
    return hf.GraniteMoeHybridModel(
        hf.GraniteMoeHybridConfig(
            **COMMON, **ATTENTION, **HEADS, layer_types=["mamba", "attention"], num_local_experts=2,
            num_experts_per_tok=1, shared_intermediate_size=24,
        )
    )  # fmt: skip


def _nemotron() -> nn.Module:
    return hf.NemotronHModel(
        hf.NemotronHConfig(
            **COMMON, **ATTENTION, head_dim=4, hybrid_override_pattern="M*", mamba_num_heads=4, mamba_head_dim=8,
            n_groups=2, ssm_state_size=5, chunk_size=8,
        )
    )  # fmt: skip


# How to build it; its kernel, number of mixers, and (head, group, state, width) of their maps.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, int, tuple[int, int, int, int]]] = {
    "mamba": (_mamba, "mamba", 2, (32, 1, 5, 1)),
    "falcon-mamba": (_falcon_mamba, "mamba", 2, (32, 1, 5, 1)),
    "jamba": (_jamba, "mamba", 1, (32, 1, 5, 1)),
    "zamba": (_zamba, "mamba", 3, (32, 2, 5, 1)),
    "mamba2": (_mamba2, "mamba2", 2, (4, 2, 5, 8)),
    "bamba": (_bamba, "mamba2", 1, (4, 2, 5, 8)),
    "falcon-h1": (_falcon_h1, "mamba2", 2, (4, 2, 5, 8)),
    "falcon-h1-norm": (_falcon_h1_with_norm, "mamba2", 2, (4, 2, 5, 8)),
    "zamba2": (_zamba2, "mamba2", 2, (4, 2, 5, 8)),
    "granite": (_granite, "mamba2", 1, (4, 2, 5, 8)),
    "nemotron": (_nemotron, "mamba2", 1, (4, 2, 5, 8)),
}
EACH = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> nn.Module:
    """The model with every parameter drawn at random."""
    return drawn(MODELS[name][0])


@EACH
@torch.no_grad()
def test_the_map_gives_back_what_the_module_gave(name: str):
    _, kernel, count, (heads, groups, state, width) = MODELS[name]
    model = build(name)
    with calls_of(model) as calls:
        model(input_ids=tokens(), use_cache=False)
    assert len(calls) == count
    for call in calls:
        assert (call.kernel, call.tap, call.is_causal) == (kernel, "reader", True)
        assert call.module is model.get_submodule(call.site)
        pattern = call.pattern()
        assert pattern.shape == (2, heads, 19, 19)
        assert call.sizes == (heads, groups, state)
        assert call.q.shape == call.k.shape == (2, groups, 19, state)
        assert call.v.shape == (2, heads, 19, width)
        assert pattern.values.shape == call.v.shape
        assert_true(call)


@EACH
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding(name: str, side: str):
    model, ids = build(name), tokens()
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(0, 4), "right": slice(-4, None), "inside": slice(6, 10)}[side]] = 0
    with calls_of(model) as calls:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for call in calls:
        assert_true(call)
        if side == "left":  # padding is neither read nor written, and reads nothing
            whole = call.pattern().dense()
            assert bool((whole[0, :, :4] == 0).all())
            assert bool((whole[0, ..., :4] == 0).all())
            assert bool((whole[0, :, 4:, 4:].diagonal(dim1=-2, dim2=-1) != 0).any())
            assert bool(call.pattern().statistics(["entropy"])["entropy"][0, :, :4].isnan().all())


@EACH
@torch.no_grad()
def test_what_goes_on_from_a_state_is_read_with_what_its_rows_read_of_that(name: str):
    model, ids = build(name), tokens(24)
    with calls_of(model) as calls:
        output = model(input_ids=ids[:, :19], use_cache=True)
    cache = {key: output[key] for key in ("cache_params", "past_key_values") if key in output}
    assert len(cache) == 1
    for start, stop in ((19, 20), (20, 21)):
        before = [call.state.left for call in calls]
        with calls_of(model) as calls:
            model(input_ids=ids[:, start:stop], use_cache=True, **cache)
        assert [call.state.found for call in calls] == before
        for call in calls:
            assert_true(call)
            assert bool((call.pattern().before != 0).any())


@EACH
@torch.no_grad()
def test_several_positions_at_once_go_on_from_a_state_or_have_dropped_it(name: str):
    """The scan of the older Mamba begins anew there, in transformers' own code: no map of the text shows that."""
    model, ids = build(name), tokens(24)
    output = model(input_ids=ids[:, :3], use_cache=True)
    cache = {key: output[key] for key in ("cache_params", "past_key_values") if key in output}
    if MODELS[name][1] == "mamba":
        with calls_of(model), pytest.raises(Unshown, match="has dropped it") as caught:
            model(input_ids=ids[:, 3:9], use_cache=True, **cache)
        assert caught.value.hint
        return
    with calls_of(model) as calls:
        model(input_ids=ids[:, 3:9], use_cache=True, **cache)
    for call in calls:
        assert_true(call)
        assert bool((call.pattern().before != 0).any())


@torch.no_grad()
def test_one_token_and_no_cache_is_read():
    for name in ("mamba", "mamba2"):
        model = build(name)
        for options in ({"use_cache": False}, {"use_cache": True}):
            with calls_of(model) as calls:
                model(input_ids=tokens(1), **options)
            for call in calls:
                assert_true(call)


@pytest.mark.parametrize("name", ["mamba", "jamba", "mamba2", "bamba"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 4e-2), (torch.float16, 1e-2)])
@torch.no_grad()
def test_other_dtypes(name: str, dtype: torch.dtype, tolerance: float):
    model = build(name).to(dtype)
    with calls_of(model) as calls:
        model(input_ids=tokens(), use_cache=False)
    for call in calls:
        assert call.output.dtype == dtype
        assert_true(call, tolerance)


@pytest.mark.parametrize("name", ["mamba", "jamba"])
@torch.no_grad()
def test_float64_scans_are_met_beyond_float32(name: str):
    """Their scans round B and x to float32 and do the rest in float64: so does the reading."""
    model = build(name).double()
    with calls_of(model) as calls:
        model(input_ids=tokens(), use_cache=False)
    for call in calls:
        assert_true(call, 1e-11)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_under_autocast_and_inference_mode(name: str):
    model = build(name)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), calls_of(model) as calls:
        model(input_ids=tokens(), use_cache=False)
    for call in calls:
        again = call.finish(call.pattern().apply(call.v))
        scale = max(1.0, float(call.output.abs().max()))
        torch.testing.assert_close(again.float(), call.output.float(), atol=4e-2 * scale, rtol=0)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_gradients_flow_through_what_follows_the_scan(name: str):
    model = build(name)
    with calls_of(model) as calls:
        model(input_ids=tokens(), use_cache=False)
    call = calls[0]
    z = call.pattern().apply(call.v).detach().requires_grad_()
    call.finish(z).sum().backward()
    assert bool((z.grad != 0).any())


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_no_mixer_looks_ahead(name: str):
    """The whole module's Jacobian has exact zeros above the diagonal, as its map has."""
    model = build(name)
    module = next(module for module in model.modules() if reader_of(module))
    hidden = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x)[0].sum(-1), hidden)[:, 0]  # [query, key, width]
    ahead = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert bool((jacobian[ahead] == 0).all())
    assert bool((jacobian[~ahead] != 0).any(-1).all())
    call = read_module("mixer", module, (hidden,), {}, module(hidden))
    assert bool((call.pattern().dense()[..., ahead] == 0).all())


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_the_model_is_left_as_it_was(name: str):
    model = build(name)
    bare = model(input_ids=tokens(), use_cache=False)[0]
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, site=site: seen.append(site)) for site, module in model.named_modules()
    ]
    model(input_ids=tokens(), use_cache=False)
    once, seen[:] = list(seen), []
    with calls_of(model) as calls:
        observed = model(input_ids=tokens(), use_cache=False)[0]
    assert calls
    assert torch.equal(bare, observed)
    assert seen == once  # the reading runs no module's hooks again
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_statistics_of_a_mixer_are_those_of_its_dense_map():
    model = build("jamba").double()
    with calls_of(model) as calls:
        model(input_ids=tokens(), use_cache=False)
    pattern = calls[0].pattern()
    names = ["entropy", "received", "signed_mass", "distance"]
    want = dense(pattern.dense(), names, pattern.mask, by_magnitude=True)
    for name, value in pattern.statistics(names).items():
        torch.testing.assert_close(value, want[name], atol=1e-9, rtol=1e-9, equal_nan=True)


def test_only_mixers_are_mixers():
    model = build("jamba")
    found = [site for site, module in model.named_modules() if reader_of(module)]
    assert found == ["layers.0.mamba"]

    class MambaMixer(nn.Module):
        """Somebody else's class of that name."""

    class Mine(type(model.layers[0].mamba)):
        """A class of one's own on top of a known one."""

    assert reader_of(MambaMixer()) is None
    assert reader_of(Mine(model.config, 0)) is not None
    with pytest.raises(CaptureError, match="has no reader"):
        read_module("here", nn.Linear(2, 2), (torch.zeros(1, 2, 2),), {}, torch.zeros(1, 2, 2))


def test_what_cannot_be_read_is_refused():
    module = next(module for module in build("mamba").modules() if reader_of(module))
    hidden = torch.randn(1, 4, 16)
    output = module(hidden)
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("cannot be told", (hidden, SimpleNamespace()), {}),
        ("cannot be told", (hidden,), {"cache_params": SimpleNamespace()}),
        ("packed", (hidden,), {"seq_idx": torch.zeros(1, 4)}),
        (r"packed sequences \(cu_seq_lens_q\)", (hidden,), {"cu_seq_lens_q": torch.zeros(2)}),
    ]
    for message, args, kwargs in cases:
        with pytest.raises(CaptureError, match=message) as caught:
            read_module("a.site", module, args, kwargs, output)
        assert caught.value.site == "a.site"
        assert caught.value.hint
    assert continues(module, (hidden, SimpleNamespace()), {})  # a cache that does not tell
    assert not continues(module, (hidden, SimpleNamespace(has_previous_state=lambda layer: False)), {})
    del module.x_proj
    with pytest.raises(CaptureError, match="not built as those that its reader knows"):
        read_module("a.site", module, (hidden,), {}, output)
