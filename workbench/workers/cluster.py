"""A Ray cluster, or Ray on this machine: started when it is needed, with what it has, and ended again."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from workbench.errors import WorkbenchError

_STARTS = 3  # how often Ray is started: it gives itself half a minute, which a busy machine may not give it
_ANSWER = 10.0  # seconds within which a cluster's address must take a connection; Ray itself tries for minutes


class Cluster:
    """The connection to Ray, and the actors that were started on it.

    Args:
        kind: class of the actors; made with their number of threads and the path of modules.
        workers, cpus, gpus, memory, address, patience: as of `RayWorkers`; the last one can be read.
    """

    def __init__(
        self, kind: type, workers: int | None, cpus: int, gpus: float, memory: int | None, address: str | None,
        patience: float,
    ) -> None:  # fmt: skip
        self._kind = kind
        self._asked, self._cpus, self._gpus, self._memory = workers, cpus, gpus, memory
        self._address, self.patience = address, patience
        self._ray: Any = None
        self._began = False  # whether Ray was started here
        self._workers: list[Any] = []

    @property
    def ray(self) -> Any:
        """The module; Ray is running."""
        return self._ray if self._ray is not None else self.started()

    def started(self) -> Any:
        """Ray, connected.

        Raises:
            WorkbenchError: it is not installed, or there is no cluster at the address.
        """
        if self._ray is not None and self._ray.is_initialized():
            return self._ray
        try:
            import ray
        except ModuleNotFoundError as error:
            raise WorkbenchError(
                'engine="ray" needs Ray, which is not installed', hint="pip install 'attention-workbench[scale]'"
            ) from error
        self._ray, self._workers = ray, []
        if ray.is_initialized():
            return ray
        self._check_address()
        own = self._address is None and "RAY_ADDRESS" not in os.environ
        size: dict[str, Any] = {"num_cpus": self._cpus * self._asked} if own and self._asked else {}
        there = _children()
        for left in reversed(range(_STARTS)):
            try:
                ray.init(
                    address=self._address, include_dashboard=False if own else None, log_to_driver=False,
                    logging_level=logging.ERROR, **size,
                )  # fmt: skip
                break
            except Exception as error:  # Ray raises plain exceptions, such as of a machine that is too busy to start
                _end(_children() - there)
                if not left:
                    said = (str(error) or type(error).__name__).splitlines()[0][:300]
                    raise WorkbenchError(f"Ray did not start: {said}", hint="is the machine busy?") from error
        self._began = True
        return ray

    def _check_address(self) -> None:
        place = (self._address or "").removeprefix("ray://")
        host, _, port = place.rpartition(":")
        if not host:
            return
        try:
            socket.create_connection((host, int(port)), _ANSWER).close()
        except (OSError, ValueError) as error:
            raise WorkbenchError(
                f"no Ray cluster answers at {self._address}: {error}",
                hint="`ray start --head --port=6379` starts one; leave address= out for workers on this machine",
            ) from error

    def workers(self) -> list[Any]:
        """The actors; started if they are not.

        Raises:
            WorkbenchError: the cluster does not have what they ask for, or they do not start in time.
        """
        ray = self.started()
        if not self._workers:
            self._workers = [self._start() for _ in range(self._how_many())]
            try:
                ray.get([worker.pid.remote() for worker in self._workers], timeout=self.patience)
            except ray.exceptions.RayError as error:
                n = len(self._workers)
                self._end_workers()
                raise WorkbenchError(
                    f"{n} workers did not start within {self.patience:g} s: {str(error).splitlines()[0][:200]}",
                    hint="is the cluster busy? fewer workers, or a larger patience=",
                ) from error
        return self._workers

    def replace(self, number: int) -> Any:
        """A new worker in the place of one that was lost; a reference that is ready when it has started."""
        with suppress(Exception):  # it is gone
            self.ray.kill(self._workers[number])
        self._workers[number] = self._start()
        return self._workers[number].pid.remote()

    def check_room(self, size: int) -> None:
        """Refuse copies of a model that the cluster has no memory for.

        Raises:
            WorkbenchError: as said.
        """
        ray = self.started()
        n, room = self._how_many(), ray.cluster_resources().get("memory", float("inf"))
        if not self._gpus and n * size > room:
            raise WorkbenchError(
                f"{n} copies of the model take {n * size:,} bytes, and the cluster has {room:,.0f}",
                hint="fewer workers",
            )

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        ray, began = self._ray, self._began
        self._end_workers()
        self._ray, self._began = None, False
        if began and ray is not None and ray.is_initialized():
            ray.shutdown()

    def _end_workers(self) -> None:
        ray, ending = self._ray, self._workers
        self._workers = []
        if ray is not None and ray.is_initialized():
            for worker in ending:
                ray.kill(worker)

    def _how_many(self) -> int:
        has = self.ray.cluster_resources()
        room = int(has.get("CPU", 0) // self._cpus)
        if self._gpus:
            room = min(room, int(has.get("GPU", 0) / self._gpus))
        if self._memory:
            room = min(room, int(has.get("memory", 0) // self._memory))
        if room < (self._asked or 1):
            raise WorkbenchError(
                f"the cluster has room for {room} workers of {self._cpus} cpus, {self._gpus:g} gpus and "
                f"{self._memory or 0:,} bytes, not for {self._asked or 1}",
                hint="fewer workers, or smaller ones",
            )
        return self._asked or room

    def _start(self) -> Any:
        asked: dict[str, Any] = {"num_cpus": self._cpus, "num_gpus": self._gpus}
        if self._memory:
            asked["memory"] = self._memory
        return (
            self.ray.remote(self._kind)
            .options(max_restarts=0, max_task_retries=0, **asked)
            .remote(self._cpus, [one or os.getcwd() for one in sys.path])
        )


def _children() -> set[int]:
    """Processes that this one has started."""
    import psutil  # comes with Ray

    return {child.pid for child in psutil.Process().children(recursive=True)}


def _end(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
