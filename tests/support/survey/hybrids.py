"""Recurrences, short convolutions, linear attention and state spaces, alone or between layers of attention."""

from __future__ import annotations

import transformers as hf

from support.survey.surveyed import GROUPED, PAIR, TEXT, Surveyed, uncached

_STATE = {"mamba_d_state": 6, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_DELTA = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "head_dim": 8, "moe_intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "linear_head_dim": 8, "linear_num_heads": 4,
    "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip

HYBRIDS = [
    Surveyed("Bamba", lambda: hf.BambaModel(hf.BambaConfig(**PAIR, **_STATE, attn_layer_indices=[1])), uncached),
    Surveyed("Zamba 2", lambda: hf.Zamba2Model(hf.Zamba2Config(
        **{**GROUPED, "num_hidden_layers": 3}, mamba_d_state=6, n_mamba_heads=8, mamba_headdim=8, mamba_expand=2,
        mamba_ngroups=1, attention_head_dim=16, use_mem_rope=True, adapter_rank=4, num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid", "mamba"], hybrid_layer_ids=[1])), uncached),
    Surveyed("Falcon-H1", lambda: hf.FalconH1Model(hf.FalconH1Config(
        **GROUPED, mamba_d_ssm=64, mamba_d_state=6, mamba_d_head=8, mamba_n_heads=8, mamba_n_groups=1)), uncached),
    Surveyed("LFM2", lambda: hf.Lfm2Model(hf.Lfm2Config(
        **PAIR, layer_types=["conv", "full_attention"])), uncached),
    Surveyed("Qwen3-Next", lambda: hf.Qwen3NextModel(hf.Qwen3NextConfig(
        **PAIR, **_DELTA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24)), uncached),
    Surveyed("Qwen3.5", lambda: hf.Qwen3_5TextModel(hf.Qwen3_5TextConfig(**PAIR, **_DELTA)), uncached),
    Surveyed("OLMo Hybrid", lambda: hf.OlmoHybridModel(hf.OlmoHybridConfig(
        **PAIR, **{key: value for key, value in _DELTA.items() if key != "head_dim"})), uncached),
    Surveyed("Kimi Linear", lambda: hf.KimiLinearModel(hf.KimiLinearConfig(**{**PAIR, **_LATENT})), uncached),
    Surveyed("Ling 3", lambda: hf.BailingHybridModel(hf.BailingHybridConfig(**{**PAIR, **_LATENT})), uncached),
    Surveyed("RecurrentGemma", lambda: hf.RecurrentGemmaModel(hf.RecurrentGemmaConfig(
        **{**GROUPED, "num_hidden_layers": 3}, lru_width=32, attention_window_size=8, head_dim=8)), uncached),
    Surveyed("RWKV", lambda: hf.RwkvModel(hf.RwkvConfig(
        num_hidden_layers=2, hidden_size=32, attention_hidden_size=32, intermediate_size=48, vocab_size=60)),
        uncached),
    Surveyed("MiniMax", lambda: hf.MiniMaxModel(hf.MiniMaxConfig(
        **PAIR, head_dim=8, num_local_experts=2, block_size=6,
        layer_types=["linear_attention", "full_attention"])), uncached),
    Surveyed("Falcon Mamba", lambda: hf.FalconMambaModel(hf.FalconMambaConfig(
        num_hidden_layers=2, hidden_size=32, state_size=6, **TEXT)), uncached),
    Surveyed("Granite 4", lambda: hf.GraniteMoeHybridModel(hf.GraniteMoeHybridConfig(
        **PAIR, **_STATE, num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=24,
        layer_types=["mamba", "attention"])), uncached),
    Surveyed("Nemotron-H", lambda: hf.NemotronHModel(hf.NemotronHConfig(
        **{**GROUPED, "num_hidden_layers": 3}, layers_block_type=["mamba", "attention", "mlp"], ssm_state_size=6,
        mamba_num_heads=8, mamba_head_dim=8, n_groups=1, head_dim=8)), uncached),
]  # fmt: skip
