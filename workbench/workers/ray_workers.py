"""`RayWorkers`: units of work on the workers of a Ray cluster, or of this machine, each with the model attached once.

Actors rather than Ray Data's `map_batches`: a unit is done once, or again from its beginning; its result is handed on
as soon as it is there, so that the analysis' own file says what is done; an analysis may stop early, and an error of a
function arrives as itself. Streams of rows, which Ray Data is made for, do none of these.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from workbench.errors import WorkbenchError
from workbench.session.workbench import Workbench
from workbench.workers.cluster import Cluster
from workbench.workers.packing import packed_job, packed_model
from workbench.workers.protocol import Job, Unit
from workbench.workers.queue import Queue
from workbench.workers.worker import Raised, Worker

_AHEAD = 4  # results for each worker that may wait for an earlier one


class RayWorkers:
    """Workers of Ray that analyses run on: `run_sweep(…, engine=RayWorkers(2))`; `engine="ray"` takes the defaults.

    They start when they are first needed and end with `close()`, or with a `with`. Each has a copy of the model, as it
    is when an analysis begins, and computes what this process would, by the same operations on the same shapes.

    Args:
        workers: how many; by default one for every `cpus` (or `gpus`) of the cluster.
        cpus: of each worker, which are its threads. gpus: of each worker; a model on CUDA needs one, or a share of one.
        memory: bytes that a worker may take, model and all; Ray starts no more of them than a machine has memory for.
        address: of a running cluster, "host:6379" or "auto"; by default one that runs already, or one on this machine.
        load: a function that gives the model, or model and tokenizer, where workers should read it from their own disk
            instead of being sent it. The weights must be those of the model that is attached here.
        retries: how often a unit is begun again whose worker was lost.
        patience: seconds to wait for the workers to start.

    Raises:
        WorkbenchError: numbers that cannot be.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        cpus: int = 1,
        gpus: float = 0,
        memory: int | None = None,
        address: str | None = None,
        load: Callable[[], Any] | None = None,
        retries: int = 3,
        patience: float = 300.0,
    ) -> None:
        if (workers is not None and workers < 1) or cpus < 1 or gpus < 0 or retries < 0 or (memory or 1) < 1:
            raise WorkbenchError(
                f"{workers} workers with {cpus} cpus, {gpus} gpus, {memory} bytes and {retries} retries cannot be",
                hint="at least one worker with one cpu",
            )
        self._load, self._retries, self._memory, self._gpus = load, retries, memory, gpus
        self._cluster = Cluster(Worker, workers, cpus, gpus, memory, address, patience)
        self._close = weakref.finalize(self, Cluster.close, self._cluster)
        self._sent: tuple[weakref.ref[Workbench], str, Any] | None = None
        self._jobs = 0
        self.lost = 0

    @property
    def n_workers(self) -> int:
        """How many there are; starts them."""
        return len(self._cluster.workers())

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and Ray if it was started for them. The next analysis starts them anew."""
        self._sent = None
        self._cluster.close()

    def pids(self) -> list[int]:
        """Processes of the workers."""
        ray = self._cluster.ray
        return [ray.get(worker.pid.remote()) for worker in self._cluster.workers()]

    def send(self, wb: Workbench) -> None:
        """Bring a model to the workers, as it is now; nothing is sent again that has not changed.

        Raises:
            WorkbenchError: the model cannot be pickled, lies on a device that workers do not have, or is larger than
                their memory.
        """
        on = {one.device.type for one in (*wb.model.parameters(), *wb.model.buffers())}
        if ("cuda" in on) != bool(self._gpus) or on - {"cpu", "cuda"}:
            raise WorkbenchError(
                f"the model is on {', '.join(sorted(on))}, and workers have {self._gpus:g} gpus",
                hint="RayWorkers(gpus=1) for a model on CUDA, gpus=0 for one on the CPU",
            )
        size = sum(one.nbytes for one in (*wb.model.parameters(), *wb.model.buffers()))
        if self._memory is not None and size > self._memory:
            raise WorkbenchError(
                f"the model takes {size:,} bytes, and a worker may take {self._memory:,}", hint="a larger memory="
            )
        self._cluster.check_room(size)
        found = packed_model(wb, self._load)
        name = hashlib.sha256(found).hexdigest()
        if self._sent is None or self._sent[1] != name or self._sent[0]() is not wb:
            ray = self._cluster.started()
            self._sent = weakref.ref(wb), name, ray.put(found)

    def over(self, job: Job[Unit]) -> Iterator[tuple[Unit, Any]]:
        """Each unit with what the function gave for it.

        Raises:
            WorkbenchError: workers that end again and again; what a function raised in a worker, as it is.
        """
        if job.wb is not None and (self._sent is None or self._sent[0]() is not job.wb):
            self.send(job.wb)
        model = ("", ()) if job.wb is None or self._sent is None else (self._sent[1], (self._sent[2],))
        ray = self._cluster.started()
        self._jobs += 1
        work = (*model, f"{self._jobs}", (ray.put(packed_job(job.elsewhere, job.wb)),))
        queue = Queue(job.units, job.group)
        yield from _Flight(self, self._cluster, work, queue, job.in_order, self._retries).results()


class _Flight:
    """Units of one analysis, while workers compute them."""

    def __init__(
        self, owner: RayWorkers, cluster: Cluster, work: tuple[Any, ...], queue: Queue, in_order: bool, retries: int
    ) -> None:
        self.owner, self.cluster, self.work, self.queue = owner, cluster, work, queue
        self.in_order, self.retries = in_order, retries
        self.idle = deque(range(len(cluster.workers())))
        self.flying: dict[Any, tuple[int, int, Any]] = {}  # by reference: worker, number and unit
        self.done: dict[int, tuple[Any, Any]] = {}
        self.next = 0
        # Workers in the place of lost ones, and what tells that they are there.
        self.starting: dict[int | None, Any] = {}

    def results(self) -> Iterator[tuple[Any, Any]]:
        """As they are asked for."""
        ray = self.cluster.ray
        while self._give_out() or self.done:
            for number in [self.next] if self.in_order else list(self.done):
                if number in self.done:
                    self.next += 1
                    yield self.done.pop(number)
            if not self.flying:
                continue
            for reference in self._ready(ray):
                self._take(reference)

    def _ready(self, ray: Any) -> list[Any]:
        """What is there, when something is; at once where results can be handed on.

        Raises:
            WorkbenchError: nothing comes, and a worker in the place of a lost one does not start.
        """
        flying = list(self.flying)
        if self.next in self.done:
            return list(ray.wait(flying, num_returns=1, timeout=0)[0])
        new = {self.starting[worker]: worker for worker, *_ in self.flying.values() if worker in self.starting}
        if len(new) < len(flying):
            return list(ray.wait(flying, num_returns=1)[0])
        ready, _ = ray.wait([*flying, *new], num_returns=1, timeout=self.cluster.patience)
        if not ready:
            raise WorkbenchError(
                f"no worker started within {self.cluster.patience:g} s in the place of one that was lost",
                hint="has the cluster shrunk? resume= goes on with what was done, and fewer workers may do",
            )
        for one in ready:
            self.starting.pop(new.get(one), None)
        return [one for one in ready if one in self.flying]

    def _give_out(self) -> bool:
        """Give idle workers something to do; whether anything is under way."""
        most = _AHEAD * len(self.cluster.workers())
        while self.idle and not (self.in_order and len(self.done) >= most and not self.queue.put_back_any):
            worker = self.idle[0]
            found = self.queue.take(worker)
            if found is None:
                break
            self.idle.popleft()
            number, unit = found
            self.flying[self.cluster.workers()[worker].run.remote(*self.work, unit)] = worker, number, unit
        return bool(self.flying)

    def _take(self, reference: Any) -> None:
        worker, number, unit = self.flying.pop(reference)
        try:
            result = self.cluster.ray.get(reference)
        except self.cluster.ray.exceptions.RayError as error:
            tries = self.queue.put_back(number, unit, worker)
            self.owner.lost += 1
            if tries > self.retries:
                raise WorkbenchError(
                    f"a worker was lost {tries} times over the same unit of work: {_first_line(error)}",
                    hint="out of memory? give workers more with RayWorkers(memory=…), or start fewer of them",
                ) from error
            self.starting[worker] = self.cluster.replace(worker)
            self.idle.append(worker)
            return
        self.idle.append(worker)
        self.starting.pop(worker, None)
        if isinstance(result, Raised):
            result.error.add_note(f"It was raised in a worker of Ray:\n{result.where}")
            raise result.error
        self.done[number] = unit, result


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
