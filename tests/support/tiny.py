"""Tiny random models of the families that the tests cover, from their configs alone; nothing is downloaded.

`ZOO` holds all of them, `FAMILIES` the few that every test of the capture runs on. They are built in `support/zoo/`.
"""

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
]

ZOO = [*DECODERS, *ENCODERS, *VISION, *STATES, *OTHERS]


def family(name: str) -> Family:
    """The family of that name."""
    return {one.name: one for one in ZOO}[name]


FAMILIES = [
    family(name)
    for name in (
        "gpt2", "gpt2-right-padded", "gpt2-left-padded", "llama-gqa", "bert", "vit", "t5", "bart", "whisper",
    )
]  # fmt: skip
