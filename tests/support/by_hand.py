"""Attention by hand: a Hugging Face backend of five lines, in which a test changes weights and heads itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "by_hand"
Change = Callable[[Tensor], Tensor]


class ByHand:
    """A model's twin on the backend.

    Attributes:
        model: the twin, in float64.
        weights: by site, what makes new weights [batch, head, query, key] of the old.
        heads: by site, what makes new outputs [batch, head, query, width] of the old.
        seen: by site, the outputs of the last forward, before they were changed.
    """

    def __init__(self, model: Any) -> None:
        config = copy.deepcopy(model.config)
        self.model = type(model)._from_config(config, attn_implementation=NAME).eval().double()
        self.model.load_state_dict(model.state_dict())
        self.names = {module: name for name, module in self.model.named_modules()}
        self.weights: dict[str, Change] = {}
        self.heads: dict[str, Change] = {}
        self.seen: dict[str, Tensor] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, Tensor]:
        """The backend."""
        name, group = self.names[module], query.shape[1] // key.shape[1]
        scale = given["scaling"] if given.get("scaling") is not None else query.shape[-1] ** -0.5
        scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scale
        for bias in (given.get("position_bias"), attention_mask):
            scores = scores if bias is None else scores + bias
        weights = self.weights.get(name, lambda a: a)(scores.softmax(-1))
        z = weights @ value.repeat_interleave(group, 1)
        self.seen[name] = z.detach()
        return self.heads.get(name, lambda z: z)(z).transpose(1, 2), weights


@contextmanager
def by_hand(model: Any) -> Iterator[ByHand]:
    """The model's twin; the backend is registered inside the `with` only."""
    try:
        AttentionInterface.register(NAME, lambda module, *args, **given: twin.attend(module, *args, **given))
        AttentionMaskInterface.register(NAME, eager_mask)
        twin = ByHand(model)
        yield twin
    finally:
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


def gradients(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of an uneven sum of them."""
    model.zero_grad()
    logits = model(**inputs).logits
    weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weight).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
