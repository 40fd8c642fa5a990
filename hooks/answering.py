"""Libraries that split a model wait for other processes: no longer than these are patient, and an error says for whom.

Heads and weights that are split are sent by collectives, whose patience is their group's; stages of a pipeline send by
`isend` and `irecv`, whose waits are given one.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from workbench.errors import CaptureError
from workbench.kernels.sequence_parallel import roll

_SENT = re.compile(r"gloo|nccl|connection|timed out", re.IGNORECASE)  # in what libraries say of what they send


@contextmanager
def answered() -> Iterator[None]:
    """Inside, what a library sends with gloo waits no longer than `roll.patience_of` its group.

    Every step may be repeated, so that an interrupt can fall on any of them.

    Raises:
        CaptureError: another process ended, hangs or is elsewhere, where the library says no more than that a
            connection was lost or nothing came.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    user = object()
    try:
        roll.enter()
        _hurried.begin(user)
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0][:200] if str(error) else ""
        if not _SENT.search(said):
            raise
        who = roll.absent("a call of the model", range(dist.get_world_size()), {}, roll.patience_of())
        raise CaptureError(f"{who or 'another process'} did not answer: {said}", hint=roll.HINT) from error
    finally:
        _hurried.end(user)


class _Hurried:
    """Groups that would wait for half an hour, with less patience as long as something of ours is open."""

    def __init__(self) -> None:
        self._users: set[object] = set()
        self._before: dict[Any, timedelta] = {}
        self._sends: dict[str, Callable[..., Any]] = {}
        self._lock = threading.RLock()

    def begin(self, user: object) -> None:
        """For all groups that there are; those that were given a patience keep it."""
        with self._lock:
            self._users.add(user)
            for name in ("isend", "irecv"):
                self._sends.setdefault(name, getattr(dist, name))
                setattr(dist, name, _Patient(self._sends[name]))
            for group in list(dist.distributed_c10d._world.pg_map):
                patience = timedelta(seconds=roll.patience_of(group))
                for backend in roll.backends(group):
                    if backend.name() == "gloo" and backend.options._timeout > patience:
                        self._before.setdefault(backend, backend.options._timeout)
                        backend._set_default_timeout(patience)

    def end(self, user: object) -> None:
        """As they were, with the last user."""
        with self._lock:
            self._users.discard(user)
            if self._users:
                return
            for name, send in self._sends.items():
                setattr(dist, name, send)
            self._sends.clear()
            for backend, before in self._before.items():
                backend._set_default_timeout(before)
            self._before.clear()


class _Patient:
    """`isend` or `irecv`, equal to it as libraries compare them, whose transfers are waited for with patience."""

    def __init__(self, send: Callable[..., Any]) -> None:
        self._send = send

    def __call__(self, *given: Any, **options: Any) -> Any:
        work, group = self._send(*given, **options), options.get("group", given[2] if len(given) > 2 else None)
        if work is None or dist.get_backend(group) != "gloo":
            return work
        return _Work(work, timedelta(seconds=roll.patience_of(group)))

    def __eq__(self, other: object) -> bool:
        return other is self._send or (isinstance(other, _Patient) and other._send is self._send)

    def __hash__(self) -> int:
        return hash(self._send)


class _Work:
    """A transfer that is waited for with patience."""

    def __init__(self, work: Any, patience: timedelta) -> None:
        self._work, self._patience = work, patience

    def wait(self, timeout: timedelta | None = None) -> Any:
        """As of `Work`."""
        return self._work.wait(timeout or self._patience)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


_hurried = _Hurried()
