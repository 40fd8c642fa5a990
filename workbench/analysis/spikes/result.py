"""`SpikeActivity`: rates, rasters and operations of a spiking model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from workbench.errors import WorkbenchError, nearest
from workbench.storage.result import Result
from workbench.storage.typed import Between, Keys

if TYPE_CHECKING:
    import pandas as pd

ADDITION, MULTIPLICATION = 0.9, 4.6
"""Picojoules of an addition, and of a multiplication with an addition, of 32 bits at 45 nm (Horowitz 2014)."""


@dataclass(frozen=True, repr=False)
class SpikeActivity(Result):
    """What `spike_activity` counted.

    Attributes:
        populations: modules of neurons. neurons: how many each has. examples, steps: how many there were.
        rate: [population, step] spikes of a neuron at a step, a mean over neurons and examples.
        dead, saturated: [population] share of the neurons that fired at no step of any example, and at every one.
        raster: of the first example, [step, neuron] zeros and ones of some neurons, evenly apart, by population.
        layers: linear and convolutional modules. whole: whether all that a layer was given were whole numbers.
        additions: [layer] per example, of spikes that a layer was given, as many as weights that they meet.
        products: [layer] per example, of every number that it was given and each weight that it meets.
    """

    form = "workbench.spike_activity"
    filled = ("population", "step")

    populations: Annotated[tuple[str, ...], "population"]
    neurons: Annotated[tuple[int, ...], "population"]
    examples: Annotated[int, Between(1)]
    rate: Float[Tensor, "population step"]
    dead: Float[Tensor, " population"]
    saturated: Float[Tensor, " population"]
    raster: Annotated[dict[str, Integer[Tensor, "step _"]], Keys("populations")]
    layers: Annotated[tuple[str, ...], "layer"]
    whole: Annotated[tuple[bool, ...], "layer"]
    additions: Float[Tensor, " layer"]
    products: Float[Tensor, " layer"]
    provenance: dict[str, Any]

    @property
    def steps(self) -> int:
        """Steps of time."""
        return self.rate.shape[1]

    @property
    def energy(self) -> Tensor:
        """[layer] an estimate in picojoules per example: spikes are added, other numbers multiplied.

        Attention's own products, neurons and norms are left out, and so is what it costs to move numbers.
        """
        return torch.where(torch.tensor(self.whole), self.additions * ADDITION, self.products * MULTIPLICATION)

    @property
    def dense_energy(self) -> Tensor:
        """[layer] the same for a model of one step whose numbers are all multiplied."""
        return self.products / self.steps * MULTIPLICATION

    def of(self, population: str) -> Tensor:
        """[step, neuron] the raster of a population.

        Raises:
            WorkbenchError: there is none of that name.
        """
        if population not in self.raster:
            raise WorkbenchError(
                f'there are no neurons "{population}"', hint=nearest(population, self.populations, "population")
            )
        return self.raster[population]

    @property
    def table(self) -> pd.DataFrame:
        """One row per population: neurons, rate, and the shares that are dead and saturated."""
        import pandas as pd

        return pd.DataFrame(
            {
                "population": self.populations, "neurons": self.neurons, "rate": self.rate.double().mean(1).numpy(),
                "dead": self.dead.double().numpy(), "saturated": self.saturated.double().numpy(),
            }
        )  # fmt: skip

    @property
    def operations(self) -> pd.DataFrame:
        """One row per layer: its operations per example and their energy."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": self.layers, "whole": self.whole, "additions": self.additions.double().numpy(),
                "products": self.products.double().numpy(), "picojoules": self.energy.double().numpy(),
            }
        )  # fmt: skip

    def __repr__(self) -> str:
        share = float(self.energy.sum() / self.dense_energy.sum()) if len(self.layers) else float("nan")
        return (
            f"SpikeActivity({len(self.populations)} populations, {sum(self.neurons):,} neurons, {self.steps} steps, "
            f"{self.examples} examples; rate {float(self.rate.mean()):.3f}, energy {share:.2f} of a dense model's)"
        )
