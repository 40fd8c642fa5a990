"""What a model of the survey is: every mixer of tokens in it must be a site, or be listed as unread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from support.zoo.family import SPECIAL, VOCABULARY, ids

LENGTH = 17
TEXT = {"vocab_size": VOCABULARY, **SPECIAL}
TOWER = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
GROUPED = {**TOWER, "num_key_value_heads": 2, **TEXT}
PAIR = {**GROUPED, "num_hidden_layers": 2}
"""For layers that differ, or share what they compute."""


@dataclass(frozen=True)
class Surveyed:
    """A tiny model with random weights.

    Attributes:
        label: the architecture's name. build: makes it.
        inputs: keyword arguments of its forward.
        lengths: how many positions its sequences have, wherever they are resampled; no width, and no number of heads
            or examples, is one of them.
        library: the package it is from.
    """

    label: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    lengths: tuple[int, ...] = (LENGTH,)
    library: str = "transformers"

    def make(self) -> nn.Module:
        """The model, in evaluation mode; gates that begin closed are opened, as nothing would be seen to mix there."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for weight in (one for one in model.parameters() if one.is_floating_point()):
                small = min(weight.dim(), weight.numel()) > 1 and weight.std() < 0.1
                if small and weight.dim() == 4:  # of a convolution: what goes through many must not grow
                    weight.normal_(std=weight[0].numel() ** -0.5)
                elif small:
                    weight.normal_(std=0.2)
                elif not weight.any():
                    weight.normal_(std=0.1)
        return model


def tokens() -> dict[str, Any]:
    """Two rows of ids."""
    return {"input_ids": ids(2, LENGTH)}


def uncached() -> dict[str, Any]:
    """Two rows of ids, for a model that keeps a cache unless it is told not to."""
    return {"input_ids": ids(2, LENGTH), "use_cache": False}


def long(length: int) -> Callable[[], dict[str, Any]]:
    """Two rows of so many ids."""
    return lambda: {"input_ids": ids(2, length)}


def seq2seq(length: int = LENGTH) -> Callable[[], dict[str, Any]]:
    """Ids for an encoder, and nine for its decoder."""
    return lambda: {"input_ids": ids(2, length), "decoder_input_ids": ids(2, 9, seed=1), "use_cache": False}


def image(size: int) -> Callable[[], dict[str, Any]]:
    """Two images."""
    return lambda: {"pixel_values": normal(2, 3, size, size)}


def normal(*shape: int) -> torch.Tensor:
    """Random numbers, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
