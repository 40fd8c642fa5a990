"""What an investigation may cost, in forwards and minutes, and the meter that keeps it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workbench.errors import WorkbenchError
from workbench.hooks.changes import Changes

_INPUTS = ("input_ids", "inputs_embeds", "input_features", "pixel_values", "decoder_input_ids")
_WITH_GRADIENTS = 3  # a backward costs about as much as two forwards


@dataclass(frozen=True)
class Budget:
    """How much an investigation may take.

    Attributes:
        forwards: examples that run through the model; one whose gradients are kept counts as three.
        minutes: of wall time, waiting for a planner included.

    Raises:
        WorkbenchError: a budget of nothing.

    >>> Budget(2000, 5)
    Budget(forwards=2000, minutes=5)
    """

    forwards: int = 20_000
    minutes: float = 15.0

    def __post_init__(self) -> None:
        for name, value in (("forwards", self.forwards), ("minutes", self.minutes)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or math.isnan(value):
                raise WorkbenchError(
                    f"a budget of {value!r} {name} allows nothing", hint="such as forwards=20_000, minutes=15"
                )


class BudgetSpent(WorkbenchError):
    """The next forward would not fit into the budget any more."""


class Meter:
    """Counts what runs through a model, and stops before the budget is exceeded.

    Args:
        budget: what may be spent. forwards, seconds: what has been spent before, by findings that are there already.

    Attributes:
        forwards: spent so far.
    """

    def __init__(self, budget: Budget, forwards: int = 0, seconds: float = 0.0) -> None:
        self.budget, self.forwards = budget, forwards
        self._before, self._began = seconds, time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return self._before + time.monotonic() - self._began

    @property
    def left(self) -> tuple[int, float]:
        """Forwards and minutes that are left."""
        return int(max(0, self.budget.forwards - self.forwards)), max(0.0, self.budget.minutes - self.seconds / 60)

    def check(self, more: int = 0) -> None:
        """Refuse to go on.

        Raises:
            BudgetSpent: so many more forwards do not fit, or the time is over.
        """
        forwards, minutes = self.left
        if more > forwards:
            raise BudgetSpent(f"{more:,} more forwards do not fit: {forwards:,} of {self.budget.forwards:,} are left")
        if minutes <= 0:
            raise BudgetSpent(f"the {self.budget.minutes:g} minutes are over")

    @contextmanager
    def reading(self, model: nn.Module) -> Iterator[None]:
        """Inside, every forward of the model is counted before it runs; nothing stays on the model."""

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = _rows(args, kwargs) * (_WITH_GRADIENTS if torch.is_grad_enabled() else 1)
            self.check(rows)
            self.forwards += rows

        with Changes() as changes:
            changes.before(model, count, with_kwargs=True)
            yield


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many examples a call has."""
    named = [kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), torch.Tensor)]
    given = named or [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return max((len(value) for value in given if value.dim() > 1), default=1)
