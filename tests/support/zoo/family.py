"""What a family of the zoo is: a tiny random model from its config, inputs for it, and its true attention."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from support.zoo.twins import eager_outputs

VOCABULARY = 60
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ONE_TOWER = {"attentions": ("", "self")}
ENCODER_DECODER = {
    "encoder_attentions": ("encoder", "self"),
    "decoder_attentions": ("decoder", "self"),
    "cross_attentions": ("decoder", "cross"),
}
EVERY_BACKEND = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")
HUB_KERNEL = "some-org/flash-attn3"
"""A kernel's name as on Hugging Face's hub, for the one that `support/backends.py` registers."""
Truth = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class Family:
    """A model with inputs for it, and where its true attentions are found.

    Attributes:
        build: the model, with weights as its config initialises them; see `make`.
        inputs: keyword arguments of its forward.
        outputs: field of what `truth` gives -> (tower, kind) of the sites whose attentions it lists, in their order.
        truth: computes the attentions [batch, head, query, key] with a copy of the model that keeps them.
        label: the architecture's name in docs/models.md; families of one label share a row.
        note: what is particular about its attention, for docs/models.md.
        backends: Hugging Face's attention backends that the architecture has; empty for other models.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    outputs: dict[str, tuple[str, str]]
    truth: Callable[[Any, dict[str, Any]], Truth] = eager_outputs
    label: str = ""
    note: str = ""
    backends: tuple[str, ...] = ()


def make(family: Family, seed: int = 0) -> nn.Module:
    """The family's model in evaluation mode; weights are larger than usual, so that attention is not uniform."""
    torch.manual_seed(seed)
    model = family.build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not any(part in name.lower() for part in ("norm", "a_log", "conv")):
                spread = parameter.std().item()
                if spread == 0:  # biases that begin at zero
                    parameter.normal_(std=0.3)
                else:
                    parameter.mul_(max(3.0, 0.25 / spread))
    return model


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [batch, length] without special tokens."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(tokens: Tensor, side: str) -> Tensor:
    """An attention mask that hides four positions of the first row."""
    mask = torch.ones_like(tokens)
    mask[0, slice(4) if side == "left" else slice(-4, None)] = 0
    return mask


def decoder_inputs(length: int = 17) -> dict[str, Any]:
    """Two rows of tokens."""
    return {"input_ids": ids(2, length)}


def padded_inputs(side: str) -> dict[str, Any]:
    """Two rows of 17 tokens, the first with four of padding."""
    tokens = ids(2, 17)
    return {"input_ids": tokens, "attention_mask": padded(tokens, side)}


def pixels(size: int, batch: int = 2) -> dict[str, Any]:
    """Random images [batch, 3, size, size]."""
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))}
