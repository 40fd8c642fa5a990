"""What is investigated, what an analysis of it gives, and what of that later analyses need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.engine.setup import open_setup
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.roles import PLACES, HeadRoles
from workbench.errors import TaskError, WorkbenchError, expect
from workbench.session.workbench import Workbench
from workbench.storage.result import Result
from workbench.tasks.base import Task

FEWEST = 8


@dataclass(frozen=True)
class Found:
    """What an analysis gave.

    Attributes:
        numbers: JSON values, for the planner. says: sentences. results: by name, for the report.
    """

    numbers: dict[str, Any]
    says: tuple[str, ...]
    results: dict[str, Result] = field(default_factory=dict)


@dataclass
class Subject:
    """What is investigated, and what has been found of it so far.

    Attributes:
        found_with, tested_with: the halves of the task's prompts: every other one.
        known: other tasks by name, and circuits of them where some are remembered.
        places: names of the task's positions for "answer", "wrong", … as in `head_roles`.
        circuits: one after another, as they were found. confirmed: of each, whether it does the task alone.
        scale: prompts minus twins, in the metric. roles: of the circuit's heads.
    """

    wb: Workbench
    task: Task
    known: Mapping[str, Task]
    remembered: Mapping[str, Circuit]
    places: Mapping[str, tuple[str, ...]]
    seed: int
    batch_size: int
    circuits: list[Circuit] = field(default_factory=list)
    confirmed: list[bool] = field(default_factory=list)
    scale: float = 1.0
    roles: HeadRoles | None = None

    @property
    def found_with(self) -> Task:
        return self.task[0::2]

    @property
    def tested_with(self) -> Task:
        return self.task[1::2]

    @cached_property
    def graph(self) -> Graph:
        """The model's senders, receivers and edges.

        Raises:
            AttachError: the model cannot be taken apart into heads.
        """
        with open_setup(self.wb, self.task, batch_size=self.batch_size) as setup:
            return setup.graph

    @property
    def standing(self) -> Circuit:
        """The last circuit that does the task alone; the last one where none does.

        Raises:
            WorkbenchError: there is none yet.
        """
        several = [one for one, sure in zip(self.circuits, self.confirmed, strict=True) if sure] or self.circuits
        if not several:
            raise WorkbenchError("there is no circuit yet", hint='plan "circuit" first')
        return several[-1]

    def take(self, analysis: str, found: Found) -> None:
        """Remember what later analyses need of a finding."""
        if analysis == "baseline":
            self.scale = abs(found.numbers["clean"] - found.numbers["corrupted"])
        elif analysis in ("circuit", "minimality"):
            circuit = found.results.get("circuit")
            if isinstance(circuit, Circuit):
                self.circuits.append(circuit)
                self.confirmed.append(False)
        elif analysis == "faithfulness" and self.circuits:
            self.confirmed[-1] = bool(found.numbers["confirmed"])
        elif analysis == "roles":
            roles = found.results.get("roles")
            self.roles = roles if isinstance(roles, HeadRoles) else None


def check_tasks(task: Task, known: Sequence[Task]) -> None:
    """Refuse what cannot be investigated, or not be compared with.

    Raises:
        TaskError: no task, fewer than `FEWEST` prompts, a task that is compared with itself, or twice with another.
    """
    for each in (task, *known):
        expect(Task, task=each)
        if len(each) < FEWEST:
            raise TaskError(
                f"{len(each)} prompts are too few: half of them find what the other half confirms",
                hint=f"at least {FEWEST}, better 32",
            )
    names = [one.name for one in known]
    if task.name in names:
        raise TaskError(f"{task.name!r} cannot be compared with itself", hint="known: other tasks, or none")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TaskError(f"two tasks to compare with are called {twice!r}", hint="give each once, under its own name")


def places_of(task: Task, given: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """Where a task keeps what roles look at; known for the shipped ones."""
    return {key: tuple(names) for key, names in (PLACES.get(task.name, {}) if given is None else given).items()}
