"""Language models: full causal attention, grouped queries, windows, softcap, sink logits, ALiBi."""

from functools import partial

import torch
import transformers as hf
from torch import nn

from support.zoo.family import (
    EVERY_BACKEND,
    HUB_KERNEL,
    ONE_TOWER,
    SPECIAL,
    VOCABULARY,
    Family,
    decoder_inputs,
    padded_inputs,
)
from support.zoo.twins import eager_twin, sdpa_calls

_GROUPED = {
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "head_dim": 8,
    "intermediate_size": 32, "vocab_size": VOCABULARY, **SPECIAL,
}  # fmt: skip
_WINDOW = 5
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": _WINDOW}


def _gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=VOCABULARY, n_positions=64, **SPECIAL)
    )


def _gpt_neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=32, vocab_size=VOCABULARY,
            **SPECIAL,
        )
    )  # fmt: skip


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED))


def _mistral() -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=_WINDOW))


def _qwen2() -> nn.Module:
    sizes = {name: size for name, size in _GROUPED.items() if name != "head_dim"}
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes))


def _qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED))


def _gemma2() -> nn.Module:
    # A softcap of 2 bends most scores of the tiny model; the usual 50 would bend none.
    return hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_GROUPED, **_LAYERS, query_pre_attn_scalar=8, attn_logit_softcapping=2.0)
    )


def _gpt_oss() -> nn.Module:
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**_GROUPED, **_LAYERS, num_local_experts=2, num_experts_per_tok=1))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.linspace(0, 6, 6))
    return model


def _deepseek() -> nn.Module:
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **{**_GROUPED, "num_key_value_heads": 6}, kv_lora_rank=8, q_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1,
        )
    )  # fmt: skip


def _bloom() -> nn.Module:
    return hf.BloomForCausalLM(hf.BloomConfig(n_layer=2, n_head=5, hidden_size=40, vocab_size=VOCABULARY, **SPECIAL))


def _mpt() -> nn.Module:
    return hf.MptForCausalLM(
        hf.MptConfig(
            n_layers=2, n_heads=4, d_model=32, expansion_ratio=2, max_seq_len=32, vocab_size=VOCABULARY, **SPECIAL
        )
    )


def _falcon(alibi: bool) -> nn.Module:
    return hf.FalconForCausalLM(
        hf.FalconConfig(
            num_hidden_layers=2, num_attention_heads=4, hidden_size=32, vocab_size=VOCABULARY, alibi=alibi, **SPECIAL
        )
    )


DECODERS = [
    Family("gpt2", _gpt2, decoder_inputs, ONE_TOWER, label="GPT-2", backends=EVERY_BACKEND[:3]),
    Family("gpt2-right-padded", _gpt2, partial(padded_inputs, "right"), ONE_TOWER, label="GPT-2"),
    Family("gpt2-left-padded", _gpt2, partial(padded_inputs, "left"), ONE_TOWER, label="GPT-2"),
    Family("gpt-neox", _gpt_neox, decoder_inputs, ONE_TOWER, label="GPT-NeoX", backends=EVERY_BACKEND),
    Family("llama-gqa", _llama, decoder_inputs, ONE_TOWER, label="Llama", note="grouped queries",
           backends=EVERY_BACKEND),
    Family("llama-left-padded", _llama, partial(padded_inputs, "left"), ONE_TOWER, label="Llama",
           backends=(*EVERY_BACKEND, HUB_KERNEL)),
    Family("llama-right-padded", _llama, partial(padded_inputs, "right"), ONE_TOWER, label="Llama",
           backends=EVERY_BACKEND),
    Family("mistral", _mistral, decoder_inputs, ONE_TOWER, label="Mistral", note="sliding window",
           backends=EVERY_BACKEND),
    Family("mistral-left-padded", _mistral, partial(padded_inputs, "left"), ONE_TOWER, label="Mistral",
           backends=EVERY_BACKEND),
    Family("qwen2", _qwen2, decoder_inputs, ONE_TOWER, label="Qwen2", note="grouped queries", backends=EVERY_BACKEND),
    Family("qwen3", _qwen3, decoder_inputs, ONE_TOWER, label="Qwen3",
           note="grouped queries; queries and keys normalised", backends=EVERY_BACKEND),
    Family("gemma2", _gemma2, decoder_inputs, ONE_TOWER, label="Gemma 2", note="softcap; windows in every other layer",
           backends=(*EVERY_BACKEND[1:], HUB_KERNEL)),
    Family("gpt-oss", _gpt_oss, decoder_inputs, ONE_TOWER, label="gpt-oss",
           note="sink logits, so rows sum to less than one; windows in every other layer",
           backends=("eager", HUB_KERNEL)),
    Family("deepseek-v3", _deepseek, decoder_inputs, ONE_TOWER, label="DeepSeek-V3",
           note="latent attention; values narrower than keys", backends=EVERY_BACKEND),
    Family("bloom", _bloom, decoder_inputs, ONE_TOWER, label="Bloom", note="ALiBi; attention written out"),
    Family("bloom-left-padded", _bloom, partial(padded_inputs, "left"), ONE_TOWER, label="Bloom"),
    Family("mpt", _mpt, decoder_inputs, ONE_TOWER, label="MPT", note="ALiBi; attention written out"),
    Family("falcon", partial(_falcon, False), decoder_inputs, ONE_TOWER, label="Falcon", note="one key head for all",
           backends=("sdpa", "eager")),
    # On eager attention transformers adds the ALiBi twice, so that the twin is no truth for a model on SDPA.
    Family("falcon-alibi", partial(_falcon, True), decoder_inputs, ONE_TOWER, truth=sdpa_calls, label="Falcon",
           note="also with ALiBi", backends=("sdpa",)),
    Family("falcon-alibi-eager", lambda: eager_twin(_falcon(True)), decoder_inputs, ONE_TOWER, label="Falcon",
           backends=("eager",)),
]  # fmt: skip
