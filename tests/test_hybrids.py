"""Hybrids of attention and recurrences: `generate()` under a capture gives the same tokens, and is recorded whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import workbench
from test_joined import EVERYTHING, _captured, assert_same
from workbench.errors import CaptureError

COMMON = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 4, "mamba_chunk_size": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
GATED = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
             "layer_types": ["linear_attention", "full_attention"], "head_dim": 8}  # fmt: skip
LATENT = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}
SHARED = tuple(name for name in EVERYTHING if name != "lse")  # of softmax and recurrences
STATES = {"sites": lambda site: site.kind == "state"}

HYBRIDS: dict[str, Callable[[], Any]] = {
    "jamba": lambda: hf.JambaForCausalLM(hf.JambaConfig(
        **COMMON, num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4,
        mamba_dt_rank=2, use_mamba_kernels=False)),
    "bamba": lambda: hf.BambaForCausalLM(hf.BambaConfig(
        **COMMON, **SSM, num_hidden_layers=2, attn_layer_indices=[1])),
    "zamba2": lambda: hf.Zamba2ForCausalLM(hf.Zamba2Config(
        **COMMON, num_hidden_layers=2, attention_hidden_size=64, attention_head_dim=16, n_mamba_heads=4,
        mamba_headdim=16, mamba_ngroups=2, mamba_d_state=4, chunk_size=8, layers_block_type=["mamba", "hybrid"],
        num_mem_blocks=1)),
    "falcon-h1": lambda: hf.FalconH1ForCausalLM(hf.FalconH1Config(
        **COMMON, **SSM, num_hidden_layers=2, mamba_d_ssm=64, head_dim=8)),
    "granite": lambda: hf.GraniteMoeHybridForCausalLM(hf.GraniteMoeHybridConfig(
        **COMMON, **SSM, **EXPERTS, num_hidden_layers=2, layer_types=["mamba", "attention"],
        shared_intermediate_size=24)),
    "nemotron": lambda: hf.NemotronHForCausalLM(hf.NemotronHConfig(
        **COMMON, num_hidden_layers=2, head_dim=8, hybrid_override_pattern="M*", mamba_num_heads=4, mamba_head_dim=16,
        n_groups=2, ssm_state_size=4, chunk_size=8)),
    "lfm2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(
        **COMMON, num_hidden_layers=2, layer_types=["conv", "full_attention"], conv_L_cache=3)),
    "qwen3-next": lambda: hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(
        **COMMON, **GATED, num_hidden_layers=2, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16)),
    "qwen3.5": lambda: hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**COMMON, **GATED, num_hidden_layers=2)),
    "olmo": lambda: hf.OlmoHybridForCausalLM(hf.OlmoHybridConfig(
        **COMMON, **{key: value for key, value in GATED.items() if key != "head_dim"}, num_hidden_layers=2)),
    "kimi-linear": lambda: hf.KimiLinearForCausalLM(hf.KimiLinearConfig(**{**COMMON, **LATENT})),
    "minimax": lambda: hf.MiniMaxForCausalLM(hf.MiniMaxConfig(
        **COMMON, **EXPERTS, num_hidden_layers=2, head_dim=8, block_size=6,
        layer_types=["linear_attention", "full_attention"])),
    "recurrent-gemma": lambda: hf.RecurrentGemmaForCausalLM(hf.RecurrentGemmaConfig(
        **COMMON, num_hidden_layers=3, lru_width=32, attention_window_size=8, head_dim=8)),
}  # fmt: skip


EACH = pytest.mark.parametrize("name", HYBRIDS)


def _built(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    model = HYBRIDS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that no map is next to nothing
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, ids


@EACH
@torch.no_grad()
def test_a_generation_is_recorded_whole(name: str) -> None:
    """At every site, and joined it is what one forward over prompt and answer shows."""
    model, ids = _built(name)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    bare = model.generate(ids, **options)
    with workbench.attach(model) as wb:
        assert not wb.look(input_ids=ids, use_cache=False).unread
    cap, out = _captured(model, lambda m: m.generate(ids, **options), SHARED)
    assert torch.equal(out, bare)
    kinds = {site.kind for site in cap.model_sites}
    assert "state" in kinds
    assert len(kinds) > 1
    assert set(cap.ledger.values()) == {4}
    assert not cap.unrecorded
    joined = cap.joined()
    whole, _ = _captured(model, lambda m: m(bare[:, :-1], use_cache=False), SHARED)
    assert_same(joined, whole, of_statistics=2e-2)  # rows of some mixers add up to 4e-6: they have three digits
    assert all(one.before is None for one in joined)


@EACH
@torch.no_grad()
def test_what_came_before_a_capture_is_a_part_of_its_own(name: str, tmp_path: Path) -> None:
    """A·V of the steps and what their rows read of the prompt's state are what the heads give."""
    model, ids = _built(name)
    more = torch.tensor([[7, 30, 7, 12]])
    whole, _ = _captured(model, lambda m: m(torch.cat((ids, more), dim=1), use_cache=False), ("entropy",), **STATES)
    own = {"past_key_values": hf.DynamicCache(config=model.config)} if name == "recurrent-gemma" else {}
    given = model(ids, use_cache=True, **own)
    cache = own or {key: given[key] for key in ("cache_params", "past_key_values") if given.get(key) is not None}

    def steps(m: Any) -> None:
        for at in range(9, 13):
            place = {"position_ids": torch.tensor([[at]])} if name == "recurrent-gemma" else {}
            m(more[:, at - 9 : at - 8], use_cache=True, **cache, **place)

    late, _ = _captured(model, steps, ("entropy",), **STATES)
    path = late.save(tmp_path / "late.safetensors", pattern=True)
    for cap in (late, workbench.load_capture(path)):
        joined = cap.joined()
        for one, want in zip(joined, whole, strict=True):
            assert one.shape[2:] == (4, 4)
            assert "goes on from a state" in repr(cap.calls[0][one.site.name])
            close = {"atol": 2e-5, "rtol": 1e-4}
            torch.testing.assert_close(one.z, want.z[:, 9:], **close)
            torch.testing.assert_close(one.pattern.dense(), want.pattern.dense()[:, :, 9:, 9:], **close)
            values = want.pattern.values[:, :, :9].to(want.pattern.dtype)
            read = want.pattern.dense()[:, :, 9:, :9] @ values
            torch.testing.assert_close(one.before, read.transpose(1, 2), **close)
            torch.testing.assert_close(one.pattern.outputs(one.pattern.values), one.z.transpose(1, 2).float(), **close)
            own = (one.pattern.dense().abs() * one.pattern.value_norms()[:, :, None]).sum(-1)
            share = read.norm(dim=-1) / (read.norm(dim=-1) + own)
            torch.testing.assert_close(one.pattern.before_share, share, atol=1e-3, rtol=1e-3)
    bare, _ = _captured(model, steps, ("entropy",), **STATES | {"values": False})
    with pytest.raises(CaptureError, match="began before the capture"):
        bare.joined()


@EACH
@torch.no_grad()
def test_under_autocast_and_with_padding_inside(name: str) -> None:
    """What follows a map runs as the module ran, and padding is where the mask says."""
    model, ids = _built(name)
    ids = torch.cat((ids, ids.flip(1)))
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, 4:6] = 0
    given = {"attention_mask": mask, "use_cache": False}
    with torch.autocast("cpu", torch.bfloat16):
        bare = model(ids, **given).logits
        cap, out = _captured(model, lambda m: m(ids, **given), ("entropy",))
    assert torch.equal(out.logits, bare)
    assert not cap.unrecorded
    for one in cap:
        if one.site.kind == "state":
            torch.testing.assert_close(
                one.z.float(), one.pattern.apply(one.pattern.values).transpose(1, 2).float(), atol=2e-2, rtol=5e-2
            )


@EACH
@torch.no_grad()
def test_results_of_every_recurrence_add_up_to_what_it_gives(name: str) -> None:
    model, ids = _built(name)
    gave: dict[str, Tensor] = {}

    def watch(site: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            gave[site] = output if isinstance(output, Tensor) else output[0]

        return hook

    with workbench.attach(model) as wb:
        sites = [site.name for site in wb.sites if site.kind == "state"]
        handles = [model.get_submodule(site).register_forward_hook(watch(site)) for site in sites]
        with wb.capture([], z=True, sites=sites) as cap:
            model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        assert sites
        for site in sites:
            rest = gave[site] - cap[site].result().sum(2)  # the projection's bias, the same everywhere
            torch.testing.assert_close(rest, rest[:, :1].expand_as(rest), atol=5e-5, rtol=1e-4)
            assert float((gave[site] - gave[site][:, :1]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["qwen3-next", "bamba", "lfm2"])
@torch.no_grad()
def test_a_state_that_was_changed_between_steps_is_refused(name: str) -> None:
    model, ids = _built(name)
    ids = torch.cat((ids, ids.flip(1)))

    def beams(m: Any) -> None:
        given = m(ids, use_cache=True)
        given.past_key_values.reorder_cache(torch.tensor([1, 0]))
        m(ids[:, :1], past_key_values=given.past_key_values)

    cap, _ = _captured(model, beams, ("entropy",), **STATES)
    with pytest.raises(CaptureError, match="found another state in its cache") as caught:
        cap.joined()
    assert "beam search" in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3-next", "jamba", "lfm2"])
@torch.no_grad()
def test_heads_are_edited_at_steps_as_in_one_forward(name: str) -> None:
    model, ids = _built(name)
    with workbench.attach(model) as wb:
        site = next(site.name for site in wb.sites if site.kind == "state")
        for edit in (
            wb.ablate({(site, 1)}, how="zero"),
            wb.edit_pattern({(site, 1)}, lambda rows, site, head: rows),
            wb.patch({(site, 1): lambda z, site, head: 2 * z}),
        ):
            with edit:
                want = model(ids, use_cache=False).logits[:, -1]
                given = model(ids[:, :-1], use_cache=True)
                got = model(ids[:, -1:], past_key_values=given.past_key_values).logits[:, -1]
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3.5", "jamba"])
def test_verified_where_gradients_are_on(name: str) -> None:
    """Switching heads of a recurrence off has no gradients, and a user need not think of it."""
    torch.manual_seed(0)
    model = HYBRIDS[name]().eval()
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.is_grad_enabled()
    with workbench.attach(model) as wb:
        found = wb.verify(input_ids=ids, use_cache=False).raise_if_failed()
    assert {check["editable"] for check in found.checks} == {True}
