"""A study: a mechanism that is trained on data of its own kind, in forms that are compared, and what is seen of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from workbench.capture.capture import Capture
from workbench.errors import WorkbenchError, nearest

Loss = Callable[[Any, torch.Generator], Tensor]
QUICK = 2  # steps of each phase


@dataclass(frozen=True)
class Phase:
    """Steps of training by one loss.

    Attributes:
        steps: how many. loss: of a model, on examples that a generator draws; in nats. rate: AdamW's largest.
    """

    steps: int
    loss: Loss
    rate: float = 3e-3


@dataclass(frozen=True)
class Study:
    """What is trained, on what, and what is looked at.

    Attributes:
        mechanism: its name in `mechanisms.list()`. work: what the data are, one word.
        about: the data and the model, in a sentence or two.
        arms: form -> what it is; that of the first is shipped, the others are compared with it.
        make: a model of a form. phases: of its training. score: of a trained model, numbers by name.
        example: model inputs that are shown. exhibits: what is seen of a trained model and its capture on them.
        grid: rows and columns of the tokens, where they are an image.
    """

    mechanism: str
    work: str
    about: str
    arms: Mapping[str, str]
    make: Callable[[str], nn.Module]
    phases: Callable[[str], Sequence[Phase]]
    score: Callable[[Any], dict[str, float]]
    example: Callable[[], dict[str, Tensor]]
    exhibits: Callable[[Any, Capture], Sequence[Any]] = field(default=lambda model, capture: ())
    grid: tuple[int, int] | None = None

    @property
    def main(self) -> str:
        """The form that is shipped."""
        return next(iter(self.arms))

    def built(self, arm: str, seed: int = 0) -> nn.Module:
        """A model with random weights, in evaluation mode.

        Raises:
            WorkbenchError: no such form.
        """
        if arm not in self.arms:
            raise WorkbenchError(
                f'the study of "{self.mechanism}" has no form "{arm}"', hint=nearest(arm, list(self.arms), "form")
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(arm).eval()


@dataclass(frozen=True, eq=False)
class Studied:
    """A trained model of a study.

    Attributes:
        model: in float32, of weights that were rounded to half precision. scores: by name, on examples that no model
            was trained on. facts: JSON values: arm, seed, steps, seconds, parameters, and losses, (phase, step, loss).
    """

    study: Study
    model: nn.Module
    scores: dict[str, float]
    facts: dict[str, Any]

    @property
    def arm(self) -> str:
        """Which form it is of."""
        found: str = self.facts["arm"]
        return found


def run(study: Study, arm: str | None = None, seed: int = 0, *, quick: bool = False) -> Studied:
    """Make, train and score a model.

    Args:
        arm: the form; that which is shipped if None. seed: of weights and data.
        quick: a few steps, to see that it runs.

    Raises:
        WorkbenchError: no such form.
    """
    arm = study.main if arm is None else arm
    model = study.built(arm, seed)
    random, losses, done, began = torch.Generator().manual_seed(seed), list[list[float]](), 0, time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for number, phase in enumerate(study.phases(arm)):
            steps = min(QUICK, phase.steps) if quick else phase.steps
            losses += [[number, done + step, loss] for step, loss in fit(model, phase, steps, random)]
            done += steps
    seconds = time.process_time() - began
    halve(model)
    scores = {name: float(value) for name, value in study.score(model).items()}
    facts = {
        "arm": arm, "seed": seed, "steps": done, "quick": quick, "losses": losses, "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__.partition("+")[0],
    }  # fmt: skip
    return Studied(study, model, scores, facts)


def fit(
    model: nn.Module, phase: Phase, steps: int, random: torch.Generator, every: int = 25
) -> list[tuple[int, float]]:
    """Train by AdamW, in place: rates rise over the first 5 % of the steps, and fall to zero over the last 40 %.

    Returns:
        (step, mean loss since the last entry).
    """
    optimiser = torch.optim.AdamW(model.parameters(), phase.rate, betas=(0.9, 0.98), weight_decay=0.01)
    plan = LambdaLR(optimiser, lambda step: min((step + 1) / (0.05 * steps), 1, (1 - step / steps) / 0.4))
    told, losses = list[tuple[int, float]](), list[float]()
    model.train()
    for step in range(1, steps + 1):
        loss = phase.loss(model, random)
        loss.backward()
        losses.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        plan.step()
        optimiser.zero_grad()
        if step % every == 0 or step == steps:
            told.append((step, round(sum(losses) / len(losses), 4)))
            losses.clear()
    model.eval()
    return told


def halve(model: nn.Module) -> None:
    """Give a model its weights as a file has them, rounded to half precision."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
