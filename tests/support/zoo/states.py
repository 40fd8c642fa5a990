"""State-space models, and hybrids of state and attention layers; `outputs` names the attention layers only."""

import transformers as hf
from torch import nn

from support.zoo.family import ONE_TOWER, SPECIAL, VOCABULARY, Family, decoder_inputs


def _mamba() -> nn.Module:
    return hf.MambaForCausalLM(
        hf.MambaConfig(num_hidden_layers=2, hidden_size=32, state_size=5, vocab_size=VOCABULARY, **SPECIAL)
    )


def _mamba2() -> nn.Module:
    return hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            num_hidden_layers=2, num_heads=8, head_dim=8, hidden_size=32, state_size=5, n_groups=2, chunk_size=7,
            vocab_size=VOCABULARY, **SPECIAL,
        )
    )  # fmt: skip


def _jamba() -> nn.Module:
    return hf.JambaForCausalLM(
        hf.JambaConfig(
            num_hidden_layers=3, attn_layer_period=2, attn_layer_offset=1, num_attention_heads=4,
            num_key_value_heads=2, hidden_size=32, intermediate_size=32, num_experts=2, num_experts_per_tok=1,
            mamba_d_state=5, vocab_size=VOCABULARY, **SPECIAL,
        )
    )  # fmt: skip


STATES = [
    Family("mamba", _mamba, decoder_inputs, {}, label="Mamba", note="state space, selective scan"),
    Family("mamba2", _mamba2, decoder_inputs, {}, label="Mamba-2", note="state space with heads"),
    Family("jamba", _jamba, decoder_inputs, ONE_TOWER, label="Jamba", note="state layers between attention layers",
           backends=("sdpa", "eager")),
]  # fmt: skip
