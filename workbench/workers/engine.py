"""Engines by name: this process, or workers of Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from workbench.errors import WorkbenchError, nearest
from workbench.session.workbench import Workbench
from workbench.workers.protocol import LOCAL as LOCAL
from workbench.workers.protocol import Engine as Engine

NAMES = ("local", "ray")


@contextmanager
def opened(engine: str | Engine, wb: Workbench | None = None) -> Iterator[Engine]:
    """The engine of a name; one that is made for this `with` ends with it.

    Args:
        engine: "local", "ray", or a `RayWorkers`, which is left open.
        wb: whose model is sent to it.

    Raises:
        WorkbenchError: another name; Ray is not installed or does not answer.
    """
    if isinstance(engine, str) and engine not in NAMES:
        raise WorkbenchError(f'there is no engine "{engine}"', hint=nearest(engine, NAMES, "engine"))
    if engine == "local":
        yield LOCAL
    elif isinstance(engine, str):
        from workbench.workers.ray_workers import RayWorkers

        with RayWorkers() as workers:
            if wb is not None:
                workers.send(wb)
            yield workers
    elif callable(getattr(engine, "over", None)):
        if wb is not None:
            engine.send(wb)
        yield engine
    else:
        raise WorkbenchError(
            f"an engine is local, ray or a RayWorkers, not {type(engine).__name__}", hint='engine="ray"'
        )
