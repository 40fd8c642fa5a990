"""Linear layers whose weights are no floating-point matrices in memory: whole numbers, and those that are elsewhere."""

from typing import Any

import torch
from torch import Tensor, nn


class Int8(nn.Linear):
    """A linear layer whose weight is kept in whole numbers, as quantizers do."""

    def __init__(self, old: Any) -> None:
        super().__init__(old.in_features, old.out_features, bias=False)
        held = old.weight.detach()
        self.scale = float(held.abs().max()) / 127
        self.weight = nn.Parameter((held / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """As with the weight in floating point, up to its roundings."""
        return x @ (self.weight.to(x.dtype) * self.scale).T


class Elsewhere(nn.Linear):
    """A linear layer whose weight comes from where nobody else finds it, each time that it runs."""

    def __init__(self, old: Any) -> None:
        super().__init__(old.in_features, old.out_features, bias=False, device="meta")
        held = old.weight.detach().clone()
        self._bring = lambda: held

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it was."""
        return x @ self._bring().T


def put(model: nn.Module, name: str, kind: type[nn.Linear]) -> None:
    """Put such a layer in the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, kind(model.get_submodule(name)))
