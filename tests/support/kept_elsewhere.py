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


class Clipped(Int8):
    """One that also clips what enters it, so that it is no linear function, and its numbers alone say nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Of what is within a tenth of zero, as with the weight in floating point."""
        return super().forward(x.clamp(-0.1, 0.1))


class BlockState:
    """What is known of a weight in blocks: the kind of its numbers, the dtype and shape it stands for, its scales."""

    def __init__(self, dtype: torch.dtype, shape: torch.Size, scales: Tensor) -> None:
        self.quant_type, self.dtype, self.shape, self.absmax = "nf4", dtype, shape, scales


class Params4bit(nn.Parameter):
    """A weight of two numbers to a byte, in a column, with its state beside it, as bitsandbytes has it on a GPU."""

    quant_state: BlockState

    @classmethod
    def of(cls, weight: Tensor, levels: Tensor, block: int = 32) -> "Params4bit":
        """Each number as the nearest of 16 levels between −1 and 1, times the largest of its block."""
        flat = weight.detach().float().view(-1, block)
        scales = flat.abs().amax(1)
        codes = (flat[..., None] / scales[:, None, None] - levels).abs().argmin(-1).view(-1, 2).to(torch.uint8)
        made = torch.Tensor._make_subclass(cls, (codes[:, :1] << 4) | codes[:, 1:])  # type: ignore[attr-defined]
        made.quant_state = BlockState(weight.dtype, weight.shape, scales)
        return made


class Linear4bit(nn.Linear):
    """A linear layer that unpacks its weight whenever it runs, in the dtype of what enters it."""

    def __init__(self, old: Any) -> None:
        super().__init__(old.in_features, old.out_features, bias=False)
        self.register_buffer("levels", torch.linspace(-1, 1, 16))
        self.weight: Any = Params4bit.of(old.weight, self.levels)

    def forward(self, x: Tensor) -> Tensor:
        """As with the weight in floating point, up to its roundings."""
        state, packed = self.weight.quant_state, self.weight.detach()
        codes = torch.cat([packed >> 4, packed & 15], 1).long().view(len(state.absmax), -1)
        weight = (self.levels[codes] * state.absmax[:, None]).view(state.shape)
        return nn.functional.linear(x, weight.to(x.dtype))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = self.weight.quant_state.absmax


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
