"""LayerNorm and RMSNorm as the linear maps that they are once their scale is held as it was: "frozen"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.recording import same_product
from workbench.errors import AttachError
from workbench.hooks.weights import stored


@dataclass(frozen=True)
class Norm:
    """A norm y = scale · (x − mean(x) if centred) · gain + bias, whose scale depends on x.

    Attributes:
        gain, bias: [d_model] in float64. `1 + weight` where the model adds 1, as Gemma does.
        centred: whether the mean over d_model is taken off: LayerNorm, not RMSNorm.
        eps: by how much one rounding changes a number, relatively, in the dtype in which the norm runs.
    """

    name: str
    gain: Tensor
    bias: Tensor
    centred: bool
    eps: float

    def centre(self, vectors: Tensor) -> Tensor:
        """[..., d_model] without their mean, where the norm takes it off."""
        return vectors - vectors.mean(-1, keepdim=True) if self.centred else vectors

    def scale(self, given: Tensor, gave: Tensor) -> Tensor:
        """[..., 1] by what the norm multiplied, from what it was given and gave [..., d_model], in float64.

        Raises:
            AttachError: it did something else than this.
        """
        given, gave = given.double(), gave.double()
        found, made = self._fitted(given, gave)
        if not same_product(gave, made, self.eps):
            raise AttachError(f"{self.name} gives something else here than its input, scaled as a norm does")
        return found

    def misfit(self, given: Tensor, gave: Tensor) -> float:
        """By how much what it gave is off from this form, of its length; infinite beyond roundings."""
        given, gave = given.double(), gave.double()
        made = self._fitted(given, gave)[1]
        return float((made - gave).norm() / gave.norm()) if same_product(gave, made, self.eps) else float("inf")

    def _fitted(self, given: Tensor, gave: Tensor) -> tuple[Tensor, Tensor]:
        shape, left = self.centre(given) * self.gain, gave - self.bias
        found = (shape * left).sum(-1, keepdim=True) / shape.square().sum(-1, keepdim=True).clamp_min(1e-300)
        return found, shape * found + self.bias

    def back(self, scale: Tensor, towards: Tensor) -> tuple[Tensor, Tensor]:
        """A direction [..., d_model] in what the norm gives as one in what it is given; what its bias adds [...]."""
        direction: Tensor = self.centre(towards * self.gain) * scale
        return direction, (towards * self.bias).sum(-1)


def find_norm(name: str, module: nn.Module, given: Tensor, gave: Tensor, eps: float) -> Norm:
    """The norm that a module is, by value: its own parameters, or 1 + these, are tried as its gain and bias.

    Raises:
        AttachError: it is none.
    """
    width = given.shape[-1]
    if gave.shape != given.shape:
        raise AttachError(f"{name} ({type(module).__name__}) gives vectors of another width than it is given")
    held: list[Tensor] = []
    for each, parameter in module.named_parameters():
        there = stored(module, each, parameter)
        if there is None:
            raise AttachError(f"the weights of {name} are offloaded to where they cannot be read",
                              hint="load the model into memory")  # fmt: skip
        if there.shape == (width,) and there.is_floating_point():
            held.append(there.detach().to(given.device, torch.float64))
    one, none = given.new_ones(width, dtype=torch.float64), given.new_zeros(width, dtype=torch.float64)
    forms = [
        Norm(name, gain, bias, centred, eps)
        for gain in (*held, *(1 + each for each in held), one)
        for bias in (none, *held)
        for centred in (False, True)
    ]
    best = min(forms, key=lambda form: form.misfit(given, gave))
    if best.misfit(given, gave) < float("inf"):
        return best
    raise AttachError(
        f"{name} ({type(module).__name__}) is no LayerNorm or RMSNorm",
        hint="only these are linear once their scale is held, so that parts have shares of a logit",
    )
