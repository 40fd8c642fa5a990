"""Tiny random models of the families that the tests cover, from their configs alone; nothing is downloaded.

`ZOO` holds all of them, `FAMILIES` the few that every test of the capture runs on. They are built in `support/zoo/`.
"""

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from support.zoo.decoders import DECODERS
from support.zoo.encoders import ENCODERS
from support.zoo.family import ENCODER_DECODER, ONE_TOWER, SPECIAL, VOCABULARY, Family, decoder_inputs, make
from support.zoo.others import OTHERS
from support.zoo.states import STATES
from support.zoo.twins import eager_attentions, eager_twin
from support.zoo.vision import VISION

__all__ = [
    "ENCODER_DECODER",
    "FAMILIES",
    "ONE_TOWER",
    "SPECIAL",
    "VOCABULARY",
    "ZOO",
    "Family",
    "decoder_inputs",
    "eager_attentions",
    "eager_twin",
    "family",
    "make",
    "small_llama",
    "some_ids",
]

ZOO = [*DECODERS, *ENCODERS, *VISION, *STATES, *OTHERS]


def small_llama(**more: Any) -> nn.Module:
    """Llama of two layers, with shared keys; `more` goes into its config."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    config = hf.LlamaConfig(**sizes, intermediate_size=32, vocab_size=VOCABULARY, **SPECIAL, **more)
    return hf.LlamaForCausalLM(config).eval()


def some_ids(*shape: int, seed: int = 0) -> Tensor:
    """Ids of that shape, none of them special."""
    return torch.randint(5, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def family(name: str) -> Family:
    """The family of that name."""
    return {one.name: one for one in ZOO}[name]


FAMILIES = [
    family(name)
    for name in (
        "gpt2", "gpt2-right-padded", "gpt2-left-padded", "llama-gqa", "bert", "vit", "t5", "bart", "whisper",
    )
]  # fmt: skip
