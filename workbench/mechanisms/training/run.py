"""Trains a model with a mechanism in its layers: the same data, budget and schedule for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from workbench.errors import WorkbenchError
from workbench.mechanisms.training.models import ByteLM, PatchModel
from workbench.mechanisms.training.text import IGNORE

Batches = Callable[[torch.Generator], tuple[Tensor, Tensor]]


@dataclass
class Trained:
    """How a run went.

    Attributes:
        losses: (step, mean training loss since the last entry), in nats. seconds: CPU time of the process.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def train(
    model: ByteLM | PatchModel,
    batch: Batches,
    *,
    steps: int,
    seed: int = 0,
    rate: float = 1.0,
    every: int = 50,
    told: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train a model in place. Muon for the matrices of the blocks, AdamW for the rest.

    Rates rise over the first 5 % of the steps, stay, and fall to zero over the last 40 %.

    Args:
        batch: draws the inputs and labels of a step; labels of −100 do not count.
        seed: of the data.
        rate: a factor on both learning rates, 0.02 and 0.003.
        every: steps between entries of the losses. told: is given each of them.

    Raises:
        WorkbenchError: this torch has no Muon (it came with 2.9), or fewer steps than one.
    """
    if not hasattr(torch.optim, "Muon"):
        raise WorkbenchError(
            f"training needs torch.optim.Muon, which torch {torch.__version__} lacks", hint="torch 2.9 or later"
        )
    if steps < 1:
        raise WorkbenchError(f"steps={steps}: there is nothing to train in fewer than one", hint="steps=1 or more")
    random, found = torch.Generator().manual_seed(seed), Trained()
    optimisers = _optimisers(model, rate)
    plans = [
        LambdaLR(each, lambda step: min((step + 1) / (0.05 * steps), 1, (1 - step / steps) / 0.4))
        for each in optimisers
    ]
    began, losses = time.process_time(), list[float]()
    model.train()
    for step in range(1, steps + 1):
        inputs, labels = batch(random)
        loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten(), ignore_index=IGNORE)
        (loss + model.stack.extra_loss()).backward()
        losses.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, plan in zip(optimisers, plans, strict=True):
            optimiser.step()
            plan.step()
        model.zero_grad()
        if step % every == 0 or step == steps:
            found.losses.append((step, sum(losses) / len(losses)))
            losses.clear()
            if told is not None:
                told(*found.losses[-1])
    found.seconds = time.process_time() - began
    model.eval()
    return found


def _optimisers(model: nn.Module, rate: float) -> Sequence[torch.optim.Optimizer]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if name.startswith("stack.") and p.dim() == 2]
    rest = [p for name, p in named if not (name.startswith("stack.") and p.dim() == 2)]
    return (
        torch.optim.AdamW(rest, 3e-3 * rate, betas=(0.9, 0.98), weight_decay=0.05),
        torch.optim.Muon(matrices, 2e-2 * rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    )
