"""Who of the processes that run together is there, and what each waits for: told through the store that they met at.

While all goes well nothing is told but each process's own number, once. One that waits long says for what; who then has
said nothing, or something else, is who the others wait for.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

PATIENCE = 50.0  # seconds: others are told within a minute
SLOW = 1.0  # seconds after which a process says that it waits
HINT = (
    "all processes make the same calls, on tensors of the same shapes, in the same order; look at that one's error, or "
    "at where it is (py-spy dump --pid …); init_process_group(timeout=…) waits longer for one that is slow"
)
_GRACE = 0.16  # of the patience: how long those who have given up wait for what others say
_known: weakref.WeakKeyDictionary[Any, dict[int, tuple[int, int]]] = weakref.WeakKeyDictionary()
_waiting: weakref.WeakSet[Any] = weakref.WeakSet()  # stores that know what this process waits for


def here() -> tuple[int, int]:
    """A number of this machine, and this process's own there."""
    return uuid.getnode(), os.getpid()


def patience_of(group: Any = None) -> float:
    """Seconds that a group's processes wait for one another: what `init_process_group(timeout=…)` says, or 50."""
    from torch.distributed.constants import default_pg_nccl_timeout, default_pg_timeout

    usual = {default_pg_timeout, default_pg_nccl_timeout}  # of gloo, and of NCCL
    for one in (group, None):
        asked = {backend.options._timeout for backend in backends(one)} - usual
        if asked:
            return float(min(asked).total_seconds())
    return PATIENCE


def backends(group: Any = None) -> list[Any]:
    """What sends for a group, where it has a patience that can be read and set."""
    import torch.distributed.distributed_c10d as c10d

    group = group or c10d._get_default_group()
    found = {id(one): one for one in (group._get_backend(device) for device in group._device_types)}.values()
    return [one for one in found if isinstance(getattr(getattr(one, "options", None), "_timeout", None), timedelta)]


def enter() -> None:
    """Tell the others this process's number, and that it does not wait any more for what it has given up."""
    store, rank = _store()
    if store not in _known:
        _known[store] = {rank: here()}
        _soon(lambda: store.set(f"workbench/pid/{rank}", json.dumps(here())), 5.0)
    elif store in _waiting:
        _say(None)


def waited(work: Any, what: str, patience: float, *, again: bool) -> None:
    """Wait for an operation of a group; where that takes long, the others can read what for.

    Args:
        again: it may be waited for once more when it was not there in time.

    Raises:
        RuntimeError: as of `torch.distributed`.
    """
    if not again or patience <= SLOW:
        work.wait(timedelta(seconds=patience))
        return
    try:
        work.wait(timedelta(seconds=SLOW))
        return
    except RuntimeError:
        if work.is_completed():
            raise
    _say(what)
    work.wait(timedelta(seconds=patience - SLOW))
    _say(None)


def _say(what: str | None) -> None:
    store, rank = _store()
    (_waiting.discard if what is None else _waiting.add)(store)
    _soon(lambda: store.set(f"workbench/at/{rank}", json.dumps(what)), 1.0)


def absent(what: str, ranks: Sequence[int], members: Mapping[int, tuple[int, int]], patience: float) -> str:
    """Which process the others wait for, "process 1 of the group (pid 7) …"; or nothing, where that cannot be seen.

    Args:
        what: this process waits for. ranks: of the group's processes among all, in the group's order.
        members: what is known already of them, by rank among all, as `here` gives it.
        patience: seconds that were waited.
    """
    store, own = _store()
    known, places = _known.get(store, {}) | dict(members), dict[int, str]()
    others = [rank for rank in ranks if rank != own]
    _say(what)
    until, answers = time.monotonic() + min(8.0, max(0.5, _GRACE * patience)), True
    while True:
        left = [rank for rank in others if rank not in places]
        told = _soon(lambda left=left: _told(store, left), max(0.1, until - time.monotonic()))  # type: ignore[misc]
        answers = told is not None
        if told is not None:
            known, places = known | told[0], places | told[1]
        left = [rank for rank in left if rank not in places]
        if text := _gone(left, ranks, known):
            return text
        if not left or time.monotonic() > until:
            break
        time.sleep(0.05)
    if text := _gone(others, ranks, known):  # one of those that waited as this one
        return text
    if not answers and own and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return f"{_named(0, ranks, known)}, which keeps what processes tell each other, has ended or hangs, and"
    if left:
        several = " or ".join(_named(rank, ranks, known) for rank in left)
        return f"{several} is there, but hangs or is slow, and"
    elsewhere = [rank for rank in others if places[rank] != what]
    if elsewhere:
        return f"{_named(elsewhere[0], ranks, known)} waits for {places[elsewhere[0]]}, this one for {what}, and"
    return ""


def _gone(some: Sequence[int], ranks: Sequence[int], known: Mapping[int, tuple[int, int]]) -> str:
    """Which of some processes have ended or were stopped, as far as they run on this machine.

    All of them: those who were told that one has ended may have ended for it, and nobody saw which was first.
    """
    found = []
    for rank in some:
        machine, pid = known.get(rank, (0, 0))
        state = _state(pid) if machine == uuid.getnode() else "there"
        if state != "there":
            found.append(f"{_named(rank, ranks, known)} {state}")
    return f"{', '.join(found)} and" if found else ""


def _named(rank: int, ranks: Sequence[int], known: Mapping[int, tuple[int, int]]) -> str:
    pid = f" (pid {known[rank][1]})" if rank in known else ""
    return f"process {ranks.index(rank) if rank in ranks else rank} of the group{pid}"


def _state(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "has ended"
    except PermissionError:
        return "there"
    try:  # one that has ended, and that its parent has not asked about, is still listed
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "there"
    return {"Z": "has ended", "X": "has ended", "T": "is stopped"}.get(state, "there")


def _told(store: Any, ranks: Sequence[int]) -> tuple[dict[int, tuple[int, int]], dict[int, str]]:
    """What processes have said of themselves, and what those wait for that wait."""
    said: dict[str, dict[int, Any]] = {"pid": {}, "at": {}}
    for name, found in said.items():
        for rank in ranks:
            key = f"workbench/{name}/{rank}"
            if store.check([key]) and (value := json.loads(store.get(key))) is not None:
                found[rank] = value
    return {rank: (machine, pid) for rank, (machine, pid) in said["pid"].items()}, said["at"]


def _soon(act: Callable[[], Any], seconds: float) -> Any:
    """What is given, if it comes in time: whoever keeps the store may hang, and it may be gone."""
    found: list[Any] = []

    def run() -> None:
        with suppress(Exception):
            found.append(act())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _store() -> tuple[Any, int]:
    import torch.distributed as dist
    import torch.distributed.distributed_c10d as c10d

    return c10d._get_default_store(), dist.get_rank()
