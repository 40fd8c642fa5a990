"""`run_sweep`: many interventions over many batches, with a file to go on from, here or on workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.errors import InterventionError, expect
from workbench.hooks.together import done_by_all
from workbench.inputs import dropout_in_training
from workbench.metrics import as_metrics
from workbench.session.workbench import Workbench
from workbench.storage.resumable import file_of, kept_when_stopped
from workbench.sweep.inputs import check_batches, check_resumed, identity
from workbench.sweep.result import Sweep, SweepInterrupted
from workbench.sweep.runner import Runner
from workbench.sweep.variants import Variant, resolve
from workbench.workers.engine import Engine, opened
from workbench.workers.protocol import Job

_SAVE_EVERY = 30.0  # seconds
_PARTS = 8  # units of work for each worker, where there are so many, so that none is idle long at the end


def run_sweep(
    wb: Workbench,
    variants: Sequence[Variant],
    batches: Iterable[Mapping[str, Any]],
    metrics: Any,
    *,
    reference: Any = None,
    base: Variant | None = None,
    batched: bool = True,
    resumed: bool = True,
    memory: int = 2 << 30,
    resume: str | Path | None = None,
    seed: int = 0,
    engine: str | Engine = "local",
    progress: bool = True,
) -> Sweep:
    """Measure variants of a model on batches; the same numbers as one forward for each, up to rounding.

    Variants that begin at the same block run side by side along the batch axis, and what lies below that block runs
    once per batch. Both are tried on the first batch and compared with plain forwards: resuming must give the same
    bits, repeating the batch the same numbers within 1e-3 of the largest; otherwise whole forwards are run, or single
    variants, with a warning. Models run without a key-value cache where they can be told so.

    Args:
        variants: what to try; see `Variant`.
        batches: dicts of model inputs; those tensors whose first axis is the batch are repeated.
        metrics: names of `workbench.metrics.METRICS`, `metric(output, batch)` that gives one number per example
            [batch], or a `workbench.Metric`, which says what it compares with and which logits it reads (see
            `workbench.sweep.kept_logits`); one, several, or a dict of them by name.
        reference: where means and resampled examples come from, as in `Workbench.ablate`; the batches by default.
        base: edits that all variants have, and the model they are compared with.
        batched, resumed: False for one variant at a time, or for whole forwards.
        memory: bytes that kept blocks and repeats may take, by a rough count.
        resume: a file to go on from, if it is there, and to write to.
        seed: for "resample", which replaces each example by several others of the reference, of the nearest length and
            on real positions, and averages the metrics over them (see `workbench.session.resampling`).
        engine: "local", "ray", or a `workbench.RayWorkers`: who runs the forwards. Numbers and file are the same.
        progress: show a bar.

    Raises:
        InterventionError: as for single interventions; or the model is not deterministic.
        WorkbenchError: no batch, batches that are no inputs, a metric of the wrong shape or one that is not finite.
        FormatError: the file is of another sweep.
        SweepInterrupted: on Ctrl-C, with what is done.

    >>> import workbench
    >>> layer = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True)
    >>> wb = workbench.attach(torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval())
    >>> variants = [Variant((0, head)) for head in range(4)]
    >>> batches = [{"src": torch.randn(2, 5, 16)}]
    >>> found = run_sweep(wb, variants, batches, lambda y, batch: y.mean((1, 2)), progress=False)
    >>> found.values.shape
    torch.Size([4, 1, 2])
    """
    expect(Workbench, wb=wb)
    wb.check_ready()
    wb.check_idle()
    dropping = dropout_in_training(wb.model)
    if dropping:
        raise InterventionError(
            f"the model drops out at {len(dropping)} modules ({dropping[0]} …), so that no two forwards are the same",
            hint="call model.eval()",
        )
    named = as_metrics(metrics)
    several = check_batches(wb.model, batches)
    given = list(variants)
    if not given:
        raise InterventionError("there is no variant to try")
    path = file_of(resume)
    of_reference = several if reference is None else reference
    every, references = resolve(wb, [*given, *([base] if base else [])], of_reference, "reference", seed, several)
    found, under = every[: len(given)], every[len(given) :]
    if under and len(under[0].draws) > 1:
        raise InterventionError("base= cannot resample, which takes several draws", hint='how="mean", or "zero"')
    runner = Runner(wb, found, under, references, several, named, memory, batched, resumed)
    with opened(engine, wb) as workers, runner.open():
        runner.try_out()
        return _Sweeping(runner, of_reference, seed, workers).run(path, progress)


class _Sweeping:
    """One sweep while it runs: what is done, and the file that keeps it."""

    def __init__(self, runner: Runner, reference: Any, seed: int, workers: Engine) -> None:
        self.runner, self.workers = runner, workers
        n, examples = len(runner.variants), sum(runner.sizes)
        self.values = torch.full((n, len(runner.metrics), examples), torch.nan, dtype=torch.float64)
        self.clean = torch.full((len(runner.metrics), examples), torch.nan, dtype=torch.float64)
        self.done = torch.zeros(n, len(runner.batches), dtype=torch.bool)
        self.identity = identity(
            runner.wb, runner.variants, runner.base, runner.batches, runner.metrics, reference, seed,
            memory=runner.memory, mode=runner.mode, batched=runner.batched,
        )  # fmt: skip

    def run(self, path: Path | None, progress: bool) -> Sweep:
        """All that is not done yet."""
        if path is not None:
            self._go_on(path)
        self.done = done_by_all(self.runner.wb.model, self.done)
        bar = tqdm(total=self.done.numel(), initial=int(self.done.sum()), disable=not progress, desc="sweep")
        with bar, kept_when_stopped(path, lambda: self._save(path), SweepInterrupted):
            self._all(path, bar)
        return self._save(path)

    @property
    def resampling(self) -> dict[str, Any]:
        """How examples were resampled, if they were."""
        drawn = [reference for reference in self.runner.references if reference.kind.singles]
        return {"resampling": {"draws": drawn[0].draws, "seed": drawn[0].seed}} if drawn else {}

    def _go_on(self, path: Path) -> None:
        if not path.exists():
            return
        held = Sweep.load(path)
        check_resumed(held.identity, self.identity, path.name)
        self.values, self.clean, self.done = held.values, held.clean, held.done

    def _all(self, path: Path | None, bar: Any) -> None:
        saved, runner = time.monotonic(), self.runner
        job = Job(runner.wb, _Batch(runner), self._units(), partial(_opened, runner), in_order=False, group=_number)
        for (number, *_), (clean, found) in self.workers.over(job):
            rows = runner.rows(number)
            self.clean[:, rows] = clean
            for chunk, totals in found:
                self.values[chunk, :, rows] = totals
                self.done[chunk, number] = True
                bar.update(len(chunk))
                if path is not None and time.monotonic() - saved > _SAVE_EVERY:
                    self._save(path)
                    saved = time.monotonic()

    def _units(self) -> Iterator[tuple[int, Tensor, int, int]]:
        """A batch, what is done of it, and which share of the rest is meant: parts of batches where these are few."""
        left = [number for number in range(len(self.runner.batches)) if not bool(self.done[:, number].all())]
        alone = self.workers.n_workers == 1
        wanted = 1 if alone or not left else -(-_PARTS * self.workers.n_workers // len(left))
        parts = min(wanted, self.runner.n_chunks) if wanted > 1 else 1
        for number in left:
            done = self.done[:, number].clone()
            yield from ((number, done, part, parts) for part in range(parts))

    def _save(self, path: Path | None) -> Sweep:
        runner = self.runner
        result = Sweep(
            variants=tuple(one.label for one in runner.variants),
            metrics=tuple(runner.metrics),
            values=self.values,
            clean=self.clean,
            done=self.done,
            batch_sizes=tuple(runner.sizes),
            mode=runner.mode,
            reason=runner.reason,
            batched=runner.batched,
            identity=self.identity,
            provenance=runner.wb.provenance() | self.resampling,
        )
        if path is not None:
            result.save(path)
        return result


class _Batch:
    """The metrics of the unedited model on a batch, and those of its variants, as they are made."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def __call__(self, unit: tuple[int, Tensor, int, int]) -> tuple[Tensor, Iterator[tuple[Any, Tensor]]]:
        number, done, part, parts = unit
        output, clean = self.runner.clean(number)
        return clean, self.runner.run(number, output, done, part, parts)


@contextmanager
def _opened(runner: Runner) -> Iterator[Callable[[Any], Any]]:
    """The same in a worker, which sends all of them at once."""
    of_batch = _Batch(runner)

    def run(unit: Any) -> Any:
        clean, found = of_batch(unit)
        return clean, list(found)

    with runner.open():
        yield run


def _number(unit: tuple[int, Tensor, int, int]) -> int:
    return unit[0]
