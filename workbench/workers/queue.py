"""Units that wait for a worker: in their order, those of one group for the worker that has begun it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any


class Queue:
    """What is still to be done.

    Args:
        units: the work; of groups all at once, else as they are asked for. group: see `Job`.

    >>> queue = Queue([(0, "a"), (0, "b"), (1, "c")], group=lambda unit: unit[0])
    >>> [queue.take(worker) for worker in (0, 1, 0, 1)]
    [(0, (0, 'a')), (2, (1, 'c')), (1, (0, 'b')), None]
    """

    def __init__(self, units: Iterable[Any], group: Callable[[Any], Hashable] | None = None) -> None:
        self._group = group
        self._coming = iter(enumerate(units))
        self._again: deque[tuple[int, Any]] = deque()
        self._tries: Counter[int] = Counter()
        self._groups: dict[Hashable, deque[tuple[int, Any]]] = {}
        self._of_worker: dict[int, Hashable] = {}
        if group is not None:
            for number, unit in self._coming:
                self._groups.setdefault(group(unit), deque()).append((number, unit))

    def take(self, worker: int) -> tuple[int, Any] | None:
        """A unit and its number; None where there is none left."""
        if self._again:
            return self._again.popleft()
        if self._group is None:
            return next(self._coming, None)
        self._groups = {name: units for name, units in self._groups.items() if units}
        if not self._groups:
            return None
        own = self._of_worker.get(worker)
        if own not in self._groups:
            busy = set(self._of_worker.values())
            free = [name for name in self._groups if name not in busy]
            own = free[0] if free else max(self._groups, key=lambda name: len(self._groups[name]))
            self._of_worker[worker] = own
        return self._groups[own].popleft()

    @property
    def put_back_any(self) -> bool:
        """Whether a unit waits that was put back."""
        return bool(self._again)

    def put_back(self, number: int, unit: Any, worker: int) -> int:
        """A unit that was not done comes first; how often it has been put back."""
        self._again.append((number, unit))
        self._of_worker.pop(worker, None)
        self._tries[number] += 1
        return self._tries[number]
