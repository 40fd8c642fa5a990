"""What is measured of image models that are shipped, for claims that are about what a model does, not how well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import workbench
from trained.claims import Found
from workbench import mechanisms
from workbench.analysis.statistics.intervals import mean_t
from workbench.mechanisms.training import scenes
from workbench.mechanisms.training.score import SEED

BY = "benchmarks/studied.py"
ROWS, PATCHES = 128, (9, 20, 35, 54)


def measured() -> dict[str, list[float]]:
    """Numbers by name, one for each head or scene."""
    return {"gate by input": gate_by_input(), "field gained": field_gained()}


@torch.no_grad()
def gate_by_input() -> list[float]:
    """Of each channel of NiNformer's gates: the share of its factors' variance that differs between scenes."""
    model = mechanisms.trained("ninformer", "images").model
    drawn = scenes(ROWS, torch.Generator().manual_seed(SEED), 3)
    with workbench.attach(model) as wb, wb.capture([]) as cap:
        model(drawn.images)
    found = workbench.gate_profile(cap, (8, 8)).table
    return list(found["by_input"] ** 2 / (found["by_input"] ** 2 + found["by_position"] ** 2))


def field_gained() -> list[float]:
    """Of each scene: how many more patches hold 90 % of the receptive field of A2Mamba's first scan with attention.

    A mean over a few patches; without attention each state is read at its own place, with the same weights.
    """
    model: Any = mechanisms.trained("a2mamba", "images").model
    drawn, given = scenes(8, torch.Generator().manual_seed(SEED), 3), list[Tensor]()
    mixer = model.stack.blocks[0].mixer
    handle = mixer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].detach()))
    with torch.no_grad():
        model(drawn.images)
        handle.remove()
        q, k, v = mixer.heads(given[0])
        u, scan = mixer.attended(q, k, v), mixer.scan
        held = [t.detach() for t in (q, k, mixer.bias)]
    areas = []
    for layer in (lambda u: scan(u, *held), lambda u: scan.read(scan.states(u), u)):
        fields = [mechanisms.field_area(mechanisms.receptive_field(layer, u, patch), 0.9) for patch in PATCHES]
        areas.append(torch.stack(fields).double().mean(0))
    found: list[float] = (areas[0] - areas[1]).tolist()
    return found


@dataclass(frozen=True)
class Shows:
    """A measure of a shipped model is above a value.

    Attributes:
        measure: its name in `measured`. value: which it is to be above. note: what it is, and of how many.
    """

    mechanism: str
    says: str
    measure: str
    value: float
    note: str

    def examine(self, found: Mapping[str, list[float]]) -> Found | None:
        """What follows from the numbers; None where they are missing."""
        numbers = found.get(self.measure)
        if not numbers:
            return None
        low, high = mean_t(torch.tensor(numbers, dtype=torch.float64))
        outcome = "holds" if low > self.value else "does not hold" if high < self.value else "undecided"
        told = f"{fmean(numbers):.2f} (95 %: {low:.2f} to {high:.2f})"
        return Found(f"{self.note}; above {self.value:g}? One model, t over {len(numbers)}; {BY}", told, outcome)


SHOWS = (
    Shows(
        "ninformer", "The gate adapts to the input what MLP-Mixer mixes in the same way for all.", "gate by input", 0.5,
        "share of a channel's variance of factors that is between scenes and not between patches; over channels",
    ),
    Shows(
        "a2mamba", "States that are attended to see more of the image than the scan alone.", "field gained", 0.0,
        "patches of 64 that hold 90 % of the gradient, more than with each state read at its own place; over scenes",
    ),
)  # fmt: skip
