"""Gates in the place of attention: what stands at a token times a factor that other tokens have a part in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from workbench.hooks.readers import Mixing, ModuleRun, gating, reader
from workbench.kernels.patterns import Pattern
from workbench.mechanisms.frame.place import Place


class Gate(nn.Module, ABC):
    """A drop-in for self-attention that mixes nothing but by a factor: x [batch, token, d_model] to finish(u · g).

    It is a site of kind "gate": a subclass says what is multiplied and by what (`parts`), what comes after (`finish`),
    and, where it is known, what each token adds to the factor (`source_map`). One whose parts mix tokens in ways that
    it shows is registered as `reader(Class, kind="gate", follows=(names of these parts,))(read_gate)`.

    Args:
        place: where it stands.

    Attributes:
        exact_length: it takes sequences of the place's length alone.
    """

    exact_length = False

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    @abstractmethod
    def parts(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied, u [batch, token, channel], and the factor g, [batch, 1 or token, 1 or channel].

        Args:
            source: what the factor is made of: x, unless the module was given something else.
        """

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """The output, [batch, token, d_model], of the product."""
        return y

    def source_map(self, x: Tensor, source: Tensor) -> Pattern | None:
        """What each token adds to the factor, of as many heads as this has channels; None where that is not known."""
        return None

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """[batch, token, d_model] to the same shape."""
        self.place.check(x, exact=self.exact_length)
        u, g = self.parts(x, x if source is None else source)
        return self.finish(u * g, x)


@reader(Gate, kind="gate")
def read_gate(run: ModuleRun) -> Mixing:
    """How every `Gate` is read."""
    module: Any = run.module
    x, given = run.inputs["x"], run.inputs.get("source")
    made_of = x if given is None else given
    u, g = module.parts(x, made_of)
    name = type(module).__name__.lower()
    return gating(u, g, finish=lambda y: module.finish(y, x), source=module.source_map(x, made_of), kernel=name)
