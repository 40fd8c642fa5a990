"""What runs in a worker: a model that is attached once, and one function at a time that is opened on it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.hooks.nested import map_tensors
from workbench.session.workbench import Workbench
from workbench.workers.packing import attached, names_of, packed, unpacked


@dataclass(frozen=True)
class Raised:
    """An error of a function, and where it arose."""

    error: BaseException
    where: str


class Worker:
    """One worker.

    Args:
        threads: that torch takes. path: where the process that sends work finds modules.
    """

    def __init__(self, threads: int, path: Sequence[str] = ()) -> None:
        import torch

        torch.set_num_threads(threads)
        sys.path += [one for one in path if one not in sys.path and os.path.isdir(one)]
        self._model, self._job = "", ""
        self._wb: Workbench | None = None
        self._opened = ExitStack()
        self._run: Any = None

    def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    def run(self, model: str, model_at: tuple[Any, ...], job: str, job_at: tuple[Any, ...], unit: Any) -> Any:
        """What the function gives for a unit, on the CPU; or what it raised.

        Args:
            model, job: names, by which the worker knows what it has opened already.
            model_at, job_at: where Ray keeps their bytes, which are fetched once.
        """
        try:
            if job != self._job:
                self._opened.close()
                self._job = ""
                if model and model != self._model:
                    self._attach(model, _fetched(model_at))
                surroundings, make = unpacked(_fetched(job_at), names_of(self._wb if model else None))
                self._opened = ExitStack()
                self._opened.enter_context(surroundings.there())
                self._run = self._opened.enter_context(make())
                self._job = job
            return map_tensors(_on_cpu, self._run(unit))
        except BaseException as error:
            return _told(error)

    def _attach(self, model: str, found: bytes) -> None:
        if self._wb is not None:
            self._wb.detach()
        self._model, self._wb = "", None
        self._wb = attached(found)
        self._model = model


def _fetched(place: tuple[Any, ...]) -> bytes:
    import ray

    found: bytes = ray.get(place[0])
    return found


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _told(error: BaseException) -> Raised:
    where = traceback.format_exc()
    if isinstance(error, ModuleNotFoundError):
        error = WorkbenchError(
            f"a worker cannot import what was sent: {error}",
            hint="put the function into the notebook or script itself, or into a module that is installed everywhere",
        )
    try:
        packed(error)
    except WorkbenchError:
        return Raised(WorkbenchError(f"{type(error).__name__}: {error}"), where)
    return Raised(error, where)
