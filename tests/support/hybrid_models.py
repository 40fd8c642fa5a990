"""Tiny hybrids of attention and recurrences whose residual stream is a sum, with dense MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from support.tiny import VOCABULARY

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
           "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def _qwen3_next() -> nn.Module:
    """A gated delta rule, and attention with a gate."""
    return hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **_COMMON, num_hidden_layers=2, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=6,
            linear_num_key_heads=2, linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"],
            mlp_only_layers=[0, 1], num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    )  # fmt: skip


def _bamba() -> nn.Module:
    """Mamba-2, with a norm over all heads behind it, and plain attention with grouped keys."""
    return hf.BambaForCausalLM(
        hf.BambaConfig(
            **_COMMON, num_hidden_layers=2, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2,
            mamba_d_state=4, mamba_chunk_size=8,
        )
    )  # fmt: skip


def _recurrent_gemma() -> nn.Module:
    """Two gated linear recurrences, whose heads are channels, and local attention."""
    return hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(**_COMMON, num_hidden_layers=3, lru_width=8, attention_window_size=8, head_dim=8)
    )


def _falcon_h1() -> nn.Module:
    """Mamba-2 and attention beside each other in every block, each times a number of its own."""
    return hf.FalconH1ForCausalLM(
        hf.FalconH1Config(
            **_COMMON, num_hidden_layers=2, head_dim=8, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16,
            mamba_n_groups=2, mamba_d_state=4, mamba_chunk_size=8, ssm_out_multiplier=0.7,
            attention_out_multiplier=1.3, ssm_in_multiplier=1.2, key_multiplier=0.6, lm_head_multiplier=0.8,
        )
    )  # fmt: skip


SUMS: dict[str, Callable[[], nn.Module]] = {
    "qwen3-next": _qwen3_next, "bamba": _bamba, "recurrent-gemma": _recurrent_gemma, "falcon-h1": _falcon_h1,
}  # fmt: skip


def hybrid(name: str) -> Any:
    """One of them, with every parameter drawn at random, so that no map is next to nothing."""
    torch.manual_seed(0)
    model = SUMS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
