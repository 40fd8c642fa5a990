"""What every method of finding circuits starts from: an open stream, prompts with twins, a metric, its baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.circuits.engine.prompts import (
    Pair,
    Where,
    check_metric,
    find_positions,
    make_pairs,
    measure_last,
    metric_of_logits,
)
from workbench.analysis.circuits.engine.stream import Finder, Kept, Stream
from workbench.analysis.circuits.model.anatomy import find_anatomy
from workbench.analysis.circuits.model.graph import Graph
from workbench.errors import WorkbenchError
from workbench.hooks.answering import answered
from workbench.inputs import device_for_inputs
from workbench.metrics import Metric
from workbench.session.workbench import Workbench
from workbench.storage.weights import weights_stay
from workbench.sweep.inputs import digest, plain
from workbench.sweep.variants import about
from workbench.tasks.base import Task
from workbench.workers.engine import LOCAL, Engine, opened
from workbench.workers.protocol import Job

NOISING = "noising"
DENOISING = "denoising"
Begin = Callable[["Setup"], Callable[[Pair], Iterable[Any]]]


@dataclass
class Setup:
    """A task on a model while it is being looked at.

    Attributes:
        pairs: the batches. clean, corrupted: [example] of the metric on prompts and twins.
        memory: bytes that repeats may take, by a rough count.
        seed: of resampling. drawn: how prompts were resampled, if they were: "draws" and "seed".
        workers: who runs batches. arguments: of `open_setup`, by which a worker opens the same.
    """

    wb: Workbench
    stream: Stream
    task: Task
    pairs: list[Pair]
    metric: Metric
    memory: int
    seed: int = 0
    clean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    corrupted: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    drawn: dict[str, int] = field(default_factory=dict)
    workers: Engine = LOCAL
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        """The model's graph."""
        return self.stream.graph

    def number(self, pair: Pair) -> int:
        """Of a batch."""
        return [one.start for one in self.pairs].index(pair.start)

    def rows(self, pair: Pair) -> slice:
        """Where a batch's examples are among all."""
        return slice(pair.start, pair.start + pair.size)

    def over(self, begin: Begin, numbers: Iterable[int] | None = None) -> Iterator[tuple[Pair, Iterable[Any]]]:
        """Each batch with what was found on it, part by part: here as the parts are made, from workers all at once.

        Args:
            begin: given a setup, here or in a worker, the function of a batch; it is pickled for workers.
            numbers: of batches; all by default.
        """
        run = begin(self)
        chosen = range(len(self.pairs)) if numbers is None else numbers
        opens = partial(_opened, self.wb, self.arguments, begin)
        for number, parts in self.workers.over(Job(self.wb, lambda n: run(self.pairs[n]), chosen, opens)):
            yield self.pairs[number], parts

    def measure_baselines(self) -> None:
        """Run prompts and twins once.

        Raises:
            TaskError: the metric cannot tell them apart.
        """
        with torch.no_grad():
            found = [each for _, parts in self.over(_baselines) for each in parts]
        clean, corrupted = zip(*found, strict=True)
        self.take_baselines(torch.cat(clean), torch.cat(corrupted))

    def take_baselines(self, clean: Tensor, corrupted: Tensor) -> None:
        """Keep the metric on prompts and twins, if it can tell them apart."""
        check_metric(self.metric.name, clean, corrupted)
        self.clean, self.corrupted = clean, corrupted

    @property
    def scale(self) -> float:
        """Divides a change of the metric: it is then a share of clean minus corrupted, and positive for a gain."""
        return self.metric.sign * float((self.clean.mean() - self.corrupted.mean()).abs())

    def record(self, pair: Pair) -> tuple[Tensor, Kept, Kept]:
        """Logits of the prompts, and what is in both streams; later runs resume from the prompts' forward."""
        with torch.no_grad():
            _, twin = self.stream.record(pair.twin, pair.scored, resume=False)
            logits, clean = self.stream.record(pair.clean, pair.scored)
        return logits, clean, twin

    def metric_of(self, logits: Tensor, pair: Pair, clean: Tensor, times: int = 1) -> Tensor:
        """[times, batch] of the metric from logits at the last token, with their gradient; see `measure_last`."""
        return measure_last(self.metric, logits, pair, clean, times)

    def measure(self, logits: Tensor, pair: Pair, clean: Tensor, times: int = 1) -> Tensor:
        """[times, batch] of the metric, in float64 on the CPU.

        Raises:
            WorkbenchError: it is not finite.
        """
        value = self.metric_of(logits, pair, clean, times).detach().to("cpu", torch.float64)
        if not bool(value.isfinite().all()):
            row = int((~value.isfinite()).any(0).nonzero()[0])
            raise WorkbenchError(
                f'the metric "{self.metric.name}" is not finite on example {pair.start + row}',
                hint="does the edited model overflow?",
            )
        return value

    def length(self, pair: Pair, stream: int) -> int:
        """Positions of a stream, padding included."""
        names = ("input_ids",) if len(pair.ends) == 1 else ("input_ids", "decoder_input_ids")
        ids = pair.clean.get(names[stream])
        return self.stream.anatomy.lengths[stream] if ids is None else ids.shape[1]

    def real(self, pair: Pair, stream: int) -> Tensor:
        """[batch, position] bool: where a stream holds no padding."""
        return pair.mask(stream, self.length(pair, stream)).bool()

    def positions(self, pair: Pair, where: Where, stream: int) -> Tensor | None:
        """[batch, n] positions of places in a stream; see `find_positions`."""
        return find_positions(self.task, self.wb.tokenizer, pair, where, stream, self.length(pair, stream))

    def most(self, pair: Pair, tensors: int = 16) -> int:
        """How many repeats of a batch fit into the memory, at `tensors` of the longest stream's size each."""
        longest = max(self.length(pair, stream) for stream in range(len(pair.ends)))
        each = pair.size * longest * self.graph.d_model * 4 * tensors
        return max(1, self.memory // each)

    def identity(self, **settings: Any) -> dict[str, Any]:
        """What a file must share to be gone on from; plain values.

        Args:
            settings: of the run.
        """
        model, device = self.wb.model, self.pairs[0].last.device.type
        return {
            "model class": f"{type(model).__module__}.{type(model).__qualname__}",
            "model weights": self.wb.weights_identity(),
            "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "",
            "task": self.task.name,
            "prompts": digest([[plain(pair.clean), plain(pair.twin)] for pair in self.pairs]),
            "number of prompts": len(self.task),
            "number of batches": len(self.pairs),
            "metric": f"{self.metric.name} {about(self.metric.function)}",
            "memory": self.memory,
            **settings,
        }

    @property
    def measured_at_end(self) -> bool:
        """Whether the logits are read at each prompt's last token alone."""
        return all(bool((pair.scored == pair.last[:, None]).all()) for pair in self.pairs)

    def provenance(self) -> dict[str, Any]:
        """Where the numbers come from."""
        task: dict[str, Any] = {"name": self.task.name, "examples": len(self.task), "source": self.task.source}
        if self.task.prepend_bos is not None:
            task["prepend_bos"] = self.task.prepend_bos
        if self.task.measured_at != "end":
            task["measured_at"] = self.task.measured_at
        found = self.wb.provenance() | {"precision": self.stream.anatomy.precision}
        found |= {"resampling": self.drawn} if self.drawn else {}
        return found | {"task": {**task, "settings": dict(self.task.settings)}}


@contextmanager
def open_setup(
    wb: Workbench,
    task: Task,
    metric: Any = "logit_diff",
    *,
    batch_size: int = 25,
    memory: int = 1 << 30,
    seed: int = 0,
    finder: Finder = find_anatomy,
    engine: str | Engine = LOCAL,
) -> Iterator[Setup]:
    """A setup whose stream is open inside.

    Args:
        finder: of the model's anatomy. engine: who runs batches.

    Raises:
        TaskError: bad prompts or metric. AttachError: a model that is no sum of senders.
    """
    device = device_for_inputs(wb.model)
    chosen = metric_of_logits(metric)
    with torch.inference_mode(mode=False):  # a model's projections are found from gradients
        pairs = make_pairs(task, wb.model, wb.tokenizer, batch_size, device)
        with answered():
            stream = Stream(wb, pairs[0], finder)
    again = {"batch_size": batch_size, "memory": memory, "seed": seed, "finder": finder, "task": task, "metric": metric}
    with (
        answered(),
        opened(engine, wb) as workers,
        torch.inference_mode(mode=False),
        stream.open(),
        weights_stay(wb.model),
    ):
        yield Setup(wb, stream, task, pairs, chosen, memory, seed, workers=workers, arguments=again)


@contextmanager
def _opened(wb: Workbench, arguments: dict[str, Any], begin: Begin) -> Iterator[Callable[[int], list[Any]]]:
    """In a worker: a function of the number of a batch, with gradients where they are on outside, as they are here."""
    learns = torch.is_grad_enabled()
    with open_setup(wb, **arguments) as setup, torch.set_grad_enabled(learns):  # leaving inference mode turns them on
        run = begin(setup)
        yield lambda number: list(run(setup.pairs[number]))


def _baselines(setup: Setup) -> Callable[[Pair], Iterator[tuple[Tensor, Tensor]]]:
    """The metric of prompts and twins, [batch] each."""

    def run(pair: Pair) -> Iterator[tuple[Tensor, Tensor]]:
        plain = setup.stream.run(pair.clean, pair.scored)
        other = setup.stream.run(pair.twin, pair.scored)
        yield setup.measure(plain, pair, plain)[0], setup.measure(other, pair, plain)[0]

    return run
