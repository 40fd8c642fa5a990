"""Blocks of a mechanism and an MLP, which language and image models share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.checks import check_range
from workbench.mechanisms.frame import Place, named

PARAMETERS = 145_000
"""What a model has at most: in half precision a file of 300 kB, with what the file says of itself."""


class Stack(nn.Module):
    """One block after the other: x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        place: of every layer.
        layers: the mechanism of each layer by name, with a variant behind a colon: ["sqa:mha", "aaren"].
        hidden: width of the MLPs; as wide as keeps the model at `PARAMETERS`, at most 3 · d_model, if None; 0 for none.
        others: parameters of the model beside its blocks.
        options: of all mechanisms.

    Raises:
        WorkbenchError: no layers, no such mechanism, one that cannot stand there or that has too many parameters.
    """

    def __init__(
        self, place: Place, layers: Sequence[str], hidden: int | None, others: int, options: dict[str, Any]
    ) -> None:
        super().__init__()
        if not layers:
            raise WorkbenchError(
                "a model has at least one layer", hint='name the mechanism of each: ["sqa:mha", "moh"]'
            )
        if isinstance(layers, str):
            raise WorkbenchError(f'layers="{layers}" is one name', hint=f'a list with one for each layer: ["{layers}"]')
        if hidden is not None:
            check_range("hidden", hidden, 0, None, hint="the width of the MLPs, 0 for none")
        mixers, d = [_mixer(place, name, options) for name in layers], place.d_model
        if hidden is None:
            fixed = others + sum(p.numel() for each in mixers for p in each.parameters()) + 2 * d * len(layers)
            hidden = min(3 * d, (PARAMETERS - fixed) // (2 * d * len(layers)))
            if hidden < 1:
                raise WorkbenchError(
                    f"{', '.join(layers)} and what is around them have {fixed:,} of {PARAMETERS:,} parameters",
                    hint="fewer layers, a smaller d_model, or hidden=",
                )
        self.layers, self.hidden = tuple(layers), hidden
        self.blocks = nn.ModuleList(_Block(d, hidden, each) for each in mixers)

    @property
    def sources(self) -> set[str]:
        """What layers take queries and keys from, where it is not their input: see `deconstructed.FromElsewhere`."""
        return {source for block in self.blocks if (source := getattr(block.mixer, "source", ""))}

    def forward(
        self, x: Tensor, beside: Mapping[str, Tensor] | None = None, embedded: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """[batch, token, d_model] to the same shape.

        Args:
            beside: what passes through the layers too, [1, token, d_model] by the name of the source that it is.
            embedded: embeddings without context of each of them, and "" of x.
        """
        streams, embedded = {"": x, **(beside or {})}, embedded or {}
        for at, block in enumerate(self.blocks):
            source = getattr(block.mixer, "source", "")
            going = streams if at + 1 < len(self.blocks) else [""]  # what passes beside the last layer nobody reads
            known = {name: embedded.get(name) if source == "embedding" else streams.get(source) for name in going}
            streams = {name: block(streams[name], known[name] if source else None) for name in going}
        return streams[""]

    def extra_loss(self) -> Tensor | float:
        """What the mechanisms add to the loss of the last forward in training."""
        kept = (getattr(module, "extra_loss", None) for module in self.modules() if module is not self)
        return sum((loss for loss in kept if isinstance(loss, Tensor)), 0.0)


class _Block(nn.Module):
    def __init__(self, d_model: int, hidden: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.mixer, self.hidden = nn.RMSNorm(d_model), mixer, hidden
        if hidden:
            self.norm2 = nn.RMSNorm(d_model)
            self.up, self.down = nn.Linear(d_model, hidden, bias=False), nn.Linear(hidden, d_model, bias=False)
            nn.init.zeros_(self.down.weight)
        if isinstance(out := getattr(mixer, "out", None), nn.Linear):
            nn.init.zeros_(out.weight)  # a block begins by doing nothing

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        beside = () if source is None else (self.norm1(source),)
        x = x + self.mixer(self.norm1(x), *beside)
        return x + self.down(F.gelu(self.up(self.norm2(x)))) if self.hidden else x


def _mixer(place: Place, name: str, options: dict[str, Any]) -> nn.Module:
    mechanism, variant = named(name)
    return mechanism.build(place, variant, **options)
