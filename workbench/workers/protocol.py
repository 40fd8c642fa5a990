"""What an analysis asks of an engine: run a function on many units of work, and hand back what it gave.

Every analysis is a loop over units (batches, prompts, masks, windows). The loop stays where it is, with its progress,
its sums and its file to go on from; only who computes a unit is an engine's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from workbench.session.workbench import Workbench

Unit = TypeVar("Unit")
Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Job(Generic[Unit]):
    """A function, and the units of work that it is run on.

    Attributes:
        wb: whose model the function runs; None for one that runs no model.
        run: the function, for this process. units: what it is run on.
        opened: makes the function in a worker, where it is opened once for all units; by default `run` itself goes
            there. It is pickled, with the model and its modules as references to the worker's own.
        in_order: results come as the units do; else as they are done.
        group: units of one group share work, and go to the same worker where that keeps none idle.
    """

    wb: Workbench | None
    run: Run
    units: Iterable[Unit]
    opened: Callable[[], AbstractContextManager[Run]] | None = None
    in_order: bool = True
    group: Callable[[Unit], Hashable] | None = None

    @property
    def elsewhere(self) -> Callable[[], AbstractContextManager[Run]]:
        """Gives the function in a worker."""
        return self.opened or partial(_as_here, self.run)


@contextmanager
def _as_here(run: Run) -> Iterator[Run]:
    yield run


class Engine(Protocol):
    """Who computes units of work."""

    @property
    def n_workers(self) -> int:
        """How many there are."""

    def send(self, wb: Workbench) -> None:
        """Bring a model to the workers, as it is now; called before anything of ours is opened on it."""

    def over(self, job: Job[Unit]) -> Iterator[tuple[Unit, Any]]:
        """Each unit with what the function gave for it."""


class Local:
    """One unit after another, in this process."""

    n_workers = 1

    def send(self, wb: Workbench) -> None:
        """Nothing: the model is here."""

    def over(self, job: Job[Unit]) -> Iterator[tuple[Unit, Any]]:
        """Each unit with what the function gave for it."""
        for unit in job.units:
            yield unit, job.run(unit)


LOCAL = Local()
