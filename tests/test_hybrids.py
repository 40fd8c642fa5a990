"""Hybrids of attention and recurrences: `generate()` under a plain capture gives the same tokens, and is recorded."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

import workbench

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
EXPANDED = {"kimi-linear"}  # its keys are made anew of cached latents at each step, which may round otherwise

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


@pytest.mark.parametrize("name", HYBRIDS)
@torch.no_grad()
def test_generation_goes_on_under_a_capture(name: str) -> None:
    torch.manual_seed(0)
    model = HYBRIDS[name]().eval()
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    bare = model.generate(ids, **options)
    with workbench.attach(model) as wb, warnings.catch_warnings(record=True) as told:
        assert not wb.look(input_ids=ids, use_cache=False).unread
        warnings.simplefilter("always")
        with wb.capture() as cap:
            assert torch.equal(model.generate(ids, **options), bare)
    states = [site.name for site in cap.model_sites if site.kind == "state"]
    attention = [site.name for site in cap.model_sites if site.kind != "state"]
    assert attention
    assert states
    assert cap.unrecorded.keys() == set(states)
    assert [cap.ledger[site] for site in attention] == [4] * len(attention)
    assert all(cap.unrecorded[site].calls == 3 for site in states)
    assert any("not recorded" in str(one.message) for one in told)
    if name not in EXPANDED:
        assert {one.site.name for one in cap.joined()} == set(attention)


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
