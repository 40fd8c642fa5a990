"""Spikformer on images with planted lesions: its stem, learning to fill in what was masked, and what spikes cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.analysis.spikes import spike_activity
from workbench.capture.capture import Capture
from workbench.mechanisms.frame import Place
from workbench.mechanisms.spikformer import FeatureNorm, Leaky, Spikformer, SpikingAttention
from workbench.mechanisms.studies.exhibit import Exhibit, Lines
from workbench.mechanisms.studies.lesions import CLASSES, SIDE, lesions
from workbench.mechanisms.studies.shipped import add
from workbench.mechanisms.studies.study import Phase, Study

PATCH, WIDTH, STEPS = 4, 24, 4
GRID = SIDE // PATCH
PLACE = Place(WIDTH, 2, GRID * GRID, causal=False, grid=(GRID, GRID))
_ROWS, _MASKED = 16, 0.75
_TEST, _SEED = 256, 99


class PatchStem(nn.Module):
    """Patches of an image as spikes by one convolution that cuts it up."""

    def __init__(self, d_model: int, steps: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, d_model, PATCH, PATCH, bias=False)
        nn.init.normal_(self.cut.weight, std=(2 / self.cut.weight[0].numel()) ** 0.5)
        self.norm, self.neurons = FeatureNorm(d_model, steps), Leaky()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, step, channel, row, column] to [batch, step, d_model, row, column]."""
        made = self.norm(self.cut(x.flatten(0, 1)).unflatten(0, x.shape[:2]).movedim(2, -1))
        spikes: Tensor = self.neurons(made)
        return spikes.movedim(-1, 2)


class SpikingReader(Spikformer):
    """Spikformer with a part that fills in pixels of masked patches; `arm` "patches" has a stem that only cuts."""

    def __init__(self, arm: str) -> None:
        super().__init__(PLACE, CLASSES, layers=1, steps=STEPS, in_channels=1)
        self.arm, self.fill = arm, nn.Linear(WIDTH, PATCH**2)
        if arm == "patches":
            self.stem = PatchStem(WIDTH, STEPS)  # type: ignore[assignment]

    def filled(self, images: Tensor) -> Tensor:
        """[image, patch, pixel] of images some of whose patches are blank."""
        x = self.stem(images[:, None].expand(-1, self.steps, -1, -1, -1)).flatten(3).mT
        for block in self.blocks:
            x = block(x)
        made: Tensor = self.fill(x.mean(1))
        return made


def _patches(images: Tensor) -> Tensor:
    """[image, patch, pixel]."""
    return F.unfold(images, PATCH, stride=PATCH).mT


def _filling(model: SpikingReader, random: torch.Generator) -> Tensor:
    images = lesions(_ROWS, random).images
    hidden = torch.rand(_ROWS, 1, GRID, GRID, generator=random) < _MASKED
    blank = images.masked_fill(hidden.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3), 0.0)
    which = hidden.flatten(1)
    return F.mse_loss(model.filled(blank)[which], _patches(images)[which])


def _reading(model: SpikingReader, random: torch.Generator) -> Tensor:
    found = lesions(_ROWS, random)
    return F.cross_entropy(model(found.images), found.classes)


def _phases(arm: str) -> list[Phase]:
    before = [Phase(150, _filling)] if arm == "filled in" else []
    return [*before, Phase(320, _reading, 5e-3)]


def with_steps(model: SpikingReader, steps: int) -> None:
    """Give an input that often, in the model and in its attention."""
    model.steps = steps
    for module in model.modules():
        if isinstance(module, SpikingAttention):
            module.steps = steps


@torch.no_grad()
def _accuracy(model: SpikingReader) -> float:
    found = lesions(_TEST, torch.Generator().manual_seed(_SEED))
    right = torch.cat([model(part) for part in found.images.split(64)]).argmax(-1) == found.classes
    return float(right.float().mean())


def _score(model: SpikingReader) -> dict[str, float]:
    activity = spike_activity(model, [lesions(32, torch.Generator().manual_seed(_SEED)).images])
    weights = torch.tensor(activity.neurons, dtype=torch.float64)
    return {
        "accuracy": _accuracy(model),
        "energy": float(activity.energy.sum() / activity.dense_energy.sum()),
        "rate": float((activity.rate.mean(1) * weights).sum() / weights.sum()),
        "dead": float((activity.dead * weights).sum() / weights.sum()),
    }


def _shown() -> Tensor:
    return lesions(3, torch.Generator().manual_seed(2)).images


def _exhibits(model: SpikingReader, capture: Capture) -> Sequence[Any]:
    few = lesions(16, torch.Generator().manual_seed(_SEED)).images
    counts, accuracy, energy, rate = (1, 2, 3, 4, 6, 8), list[float](), list[float](), list[float]()
    try:
        for steps in counts:
            with_steps(model, steps)
            accuracy.append(_accuracy(model))
            activity = spike_activity(model, [few])
            energy.append(float(activity.energy.sum() / activity.dense_energy.sum()))
            rate.append(float(activity.rate.mean()))
    finally:
        with_steps(model, STEPS)
    about = (
        f"The model was trained with {STEPS} steps, and is given its image as often as the axis says. Energy is an "
        "estimate, over that of one step whose numbers are all multiplied."
    )
    lines = (
        Lines("accuracy", counts, {"accuracy": torch.tensor(accuracy)}, "steps", "share right"),
        Lines("energy", counts, {"over one dense step": torch.tensor(energy)}, "steps", "ratio"),
        Lines("rate", counts, {"spikes of a neuron at a step": torch.tensor(rate)}, "steps", "rate"),
    )
    return [Exhibit("Accuracy, energy and rate over steps of time", about, lines), spike_activity(model, [few])]


SPIKING = add(
    Study(
        "spikformer",
        "spikes",
        "the images of MEDUSA's study: is there a faint disc, a ring, or neither? A spiking stem, one block of spiking "
        f"attention, and {STEPS} steps",
        {
            "filled in": "masked patches are filled in before, by pixels",
            "labels alone": "trained on labels alone",
            "patches": "trained on labels alone, with a stem that only cuts patches",
        },
        SpikingReader,
        _phases,
        _score,
        lambda: {"images": _shown()},
        _exhibits,
        (GRID, GRID),
    )
)
