"""A small language model on bytes, in whose layers any mechanism mixes the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.mechanisms.frame import Place, get
from workbench.mechanisms.training.text import VOCABULARY

PARAMETERS = 150_000
"""What a model has at most: 300 kB in half precision."""


class ByteLM(nn.Module):
    """Bytes to the logits of the next one: [batch, token] to [batch, token, 128].

    Each token's embedding has a learned share of the one before: without it none of these models learns to recall in
    the time that it has, whatever mixes its tokens.

    Args:
        place: of every layer; a sequence.
        layers: the mechanism of each layer by name, with a variant behind a colon: ["sqa:mha", "aaren"].
        hidden: width of the MLPs; as wide as keeps the model at `PARAMETERS`, at most 3 · d_model, if None.
        options: of all mechanisms.

    Raises:
        WorkbenchError: no such mechanism, one that cannot stand there, or one that alone has too many parameters.
    """

    def __init__(self, place: Place, layers: Sequence[str], hidden: int | None = None, **options: Any) -> None:
        super().__init__()
        if not place.causal:
            raise WorkbenchError("a language model is causal", hint="Place(…, causal=True)")
        d = place.d_model
        self.place, self.layers = place, tuple(layers)
        self.embed = nn.Embedding(VOCABULARY, d)
        self.position = nn.Parameter(0.02 * torch.randn(place.length, d))
        self.smear = nn.Parameter(torch.full((d,), 0.5))
        mixers = [_mixer(place, name, options) for name in layers]
        if hidden is None:
            fixed = sum(p.numel() for each in mixers for p in each.parameters()) + (VOCABULARY + place.length + 2) * d
            free = (PARAMETERS - fixed - 2 * d * len(layers)) // (2 * d * len(layers))
            hidden = min(3 * d, free)
            if hidden < 1:
                raise WorkbenchError(
                    f"{', '.join(layers)} and the embedding have {fixed:,} of {PARAMETERS:,} parameters"
                )
        self.hidden = hidden
        self.blocks = nn.ModuleList(_Block(d, hidden, each) for each in mixers)
        self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, VOCABULARY, bias=False)
        nn.init.normal_(self.embed.weight, std=d**-0.5)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """The logits."""
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= self.place.length:
            raise WorkbenchError(f"ids must be [batch, 1 to {self.place.length} tokens]", shape=ids.shape)
        x = self.embed(ids)
        x = x + self.position[: ids.shape[1]] + self.smear * F.pad(x, (0, 0, 1, -1))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def extra_loss(self) -> Tensor:
        """What the mechanisms add to the loss of the last forward in training."""
        kept = [getattr(module, "extra_loss", None) for module in self.modules() if module is not self]
        return sum((loss for loss in kept if isinstance(loss, Tensor)), self.smear.new_zeros(()))


class _Block(nn.Module):
    def __init__(self, d_model: int, hidden: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2 = nn.RMSNorm(d_model), mixer, nn.RMSNorm(d_model)
        self.up, self.down = nn.Linear(d_model, hidden, bias=False), nn.Linear(hidden, d_model, bias=False)
        nn.init.zeros_(self.down.weight)
        if isinstance(out := getattr(mixer, "out", None), nn.Linear):
            nn.init.zeros_(out.weight)  # a block begins by doing nothing

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


def _mixer(place: Place, name: str, options: dict[str, Any]) -> nn.Module:
    mechanism, _, variant = name.partition(":")
    return get(mechanism).build(place, variant or None, **options)
