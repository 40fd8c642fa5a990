"""A small language model on bytes and a small image model, in whose layers any mechanism mixes the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.mechanisms.deconstructed import drawn_rows
from workbench.mechanisms.frame import Place
from workbench.mechanisms.training.images import PATCH, SIDE
from workbench.mechanisms.training.stack import Stack
from workbench.mechanisms.training.text import VOCABULARY

DIGITS = 10
FIXED_TEXT = (
    b"def middle(values):\n    ordered = sorted(values)\n    return ordered[len(ordered) // 2] if ordered else None\n\n"
)
"""What layers read whose queries and keys are those of a fixed text, again and again up to the length."""


class ByteLM(nn.Module):
    """Bytes to the logits of the next one: [batch, token] to [batch, token, 128].

    Each token's embedding has a learned share of the one before: without it none of these models learns to recall in
    the time that it has, whatever mixes its tokens.

    Args:
        place: of every layer; a causal sequence.
        layers, hidden, options: see `Stack`.

    Raises:
        WorkbenchError: a place that is not causal, and what `Stack` raises.
    """

    def __init__(self, place: Place, layers: Sequence[str], hidden: int | None = None, **options: Any) -> None:
        super().__init__()
        if not place.causal:
            raise WorkbenchError("a language model is causal", hint="Place(…, causal=True)")
        d = place.d_model
        self.place = place
        self.embed = nn.Embedding(VOCABULARY, d)
        self.position = nn.Parameter(0.02 * torch.randn(place.length, d))
        self.smear = nn.Parameter(torch.full((d,), 0.5))
        self.stack = Stack(place, layers, hidden, (VOCABULARY + place.length + 2) * d, options)
        self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, VOCABULARY, bias=False)
        nn.init.normal_(self.embed.weight, std=d**-0.5)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """The logits."""
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= self.place.length:
            raise WorkbenchError(f"ids must be [batch, 1 to {self.place.length} tokens]", shape=ids.shape)
        x, embedded = self.embed(ids), self._fixed(ids.shape[1])
        beside = {name: self._placed(each) if name == "text" else each for name, each in embedded.items()}
        logits: Tensor = self.head(self.norm(self.stack(self._placed(x), beside, {"": x, **embedded})))
        return logits

    def _placed(self, x: Tensor) -> Tensor:
        return x + self.position[: x.shape[1]] + self.smear * F.pad(x, (0, 0, 1, -1))

    def _fixed(self, n: int) -> dict[str, Tensor]:
        """Embeddings, [1, token, d_model], that are the same for every input, of the sources that the layers have."""
        made, like = dict[str, Tensor](), self.embed.weight
        if "random" in self.stack.sources:
            made["random"] = drawn_rows(self.place)[None, :n].to(like)
        if "text" in self.stack.sources:
            text = torch.tensor(list(FIXED_TEXT), device=like.device)
            made["text"] = self.embed(text.repeat(-(-n // len(text)))[None, :n])
        return made


class PatchModel(nn.Module):
    """Images to the logits of ten classes, [batch, 3, 32, 32] to [batch, 10]: patches, and a read-out of their mean.

    Args:
        place: of every layer; the grid of the patches.
        layers, hidden, options: see `Stack`.

    Raises:
        WorkbenchError: a place that is no grid of the images' patches, and what `Stack` raises.
    """

    def __init__(self, place: Place, layers: Sequence[str], hidden: int | None = None, **options: Any) -> None:
        super().__init__()
        edge = SIDE // PATCH
        if place.grid != (edge, edge):
            raise WorkbenchError(f"the images have {edge} × {edge} patches", hint=f"Place(…, grid=({edge}, {edge}))")
        d = place.d_model
        self.place = place
        self.embed = nn.Conv2d(3, d, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(place.length, d))
        others = sum(p.numel() for p in self.embed.parameters()) + (place.length + 1 + DIGITS) * d
        self.stack = Stack(place, layers, hidden, others, options)
        self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, DIGITS, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        if images.dim() != 4 or images.shape[1:] != (3, SIDE, SIDE):
            raise WorkbenchError(f"images must be [batch, 3, {SIDE}, {SIDE}]", shape=images.shape)
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.stack(x)).mean(1))
        return logits
