"""What an analysis asks of an engine: run a function on many units of work, and hand back what it gave.

Every analysis is a loop over units (batches, prompts, masks, windows). The loop stays where it is, with its progress,
its sums and its file to go on from; only who computes a unit is an engine's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

from workbench.session.workbench import Workbench

Unit = TypeVar("Unit")
Run = Callable[[Any], Any]
Elsewhere = Callable[[], AbstractContextManager[Run]]
"""Made in a worker: opened once there, it gives the function that is run on each unit."""


@contextmanager
def as_here(function: Run) -> Iterator[Run]:
    """For workers, the function that runs here."""
    yield function


class Engine(Protocol):
    """Who computes units of work."""

    @property
    def n_workers(self) -> int:
        """How many there are."""

    def send(self, wb: Workbench) -> None:
        """Bring a model to the workers, as it is now; called before anything of ours is opened on it."""

    def over(
        self,
        wb: Workbench | None,
        here: Run,
        elsewhere: Elsewhere,
        units: Iterable[Unit],
        *,
        in_order: bool = True,
        group: Callable[[Unit], Hashable] | None = None,
    ) -> Iterator[tuple[Unit, Any]]:
        """Each unit with what the function gave for it.

        Args:
            wb: whose model the function runs. here: the function, for this process. elsewhere: the same for workers; it
                is pickled, with the model and its modules as references to the worker's own.
            in_order: as the units come; else as they are done.
            group: units of one group share work, and go to the same worker where that keeps none idle.
        """


class Local:
    """One unit after another, in this process."""

    n_workers = 1

    def send(self, wb: Workbench) -> None:
        """Nothing: the model is here."""

    def over(
        self,
        wb: Workbench | None,
        here: Run,
        elsewhere: Elsewhere,
        units: Iterable[Unit],
        *,
        in_order: bool = True,
        group: Callable[[Unit], Hashable] | None = None,
    ) -> Iterator[tuple[Unit, Any]]:
        """See `Engine`."""
        for unit in units:
            yield unit, here(unit)


LOCAL = Local()
