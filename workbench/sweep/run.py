"""Run many interventions over many batches: side by side in one forward, and only from the first edited block on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.errors import InterventionError, WorkbenchError
from workbench.hooks.nested import tensors
from workbench.inputs import dropout_in_training, without_cache
from workbench.metrics import Metric, as_metrics
from workbench.session.reference import Reference
from workbench.session.workbench import Workbench
from workbench.storage.resumable import kept_when_stopped
from workbench.sweep.inputs import check_batches, check_resumed, identity, size_of
from workbench.sweep.kept_logits import ARGUMENT, places_read, widened
from workbench.sweep.outputs import check_value, close, same
from workbench.sweep.prefix import Prefix
from workbench.sweep.result import Sweep, SweepInterrupted
from workbench.sweep.variants import OutputStack, Resolved, Stack, Variant, repeat, resolve, split

_SAVE_EVERY = 30.0  # seconds
_FEW_ROWS = 256  # vectors in a forward; with fewer, what a forward costs whatever its size weighs more than a block


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
    of_reference = several if reference is None else reference
    every, references = resolve(wb, [*given, *([base] if base else [])], of_reference, "reference", seed, several)
    found, under = every[: len(given)], every[len(given) :]
    if under and len(under[0].draws) > 1:
        raise InterventionError("base= cannot resample, which takes several draws", hint='how="mean", or "zero"')
    runner = _Runner(wb, found, under, references, several, named, memory, batched, resumed)
    return runner.run(Path(resume) if resume is not None else None, of_reference, seed, progress)


class _Runner:
    """One sweep while it runs."""

    def __init__(
        self,
        wb: Workbench,
        variants: list[Resolved],
        base: list[Resolved],
        references: list[Reference],
        batches: list[dict[str, Any]],
        metrics: dict[str, Metric],
        memory: int,
        batched: bool,
        resumed: bool,
    ) -> None:
        self.wb, self.variants, self.base, self.batches, self.metrics = wb, variants, base, batches, metrics
        self.memory, self.batched, self.resumed, self.reason = memory, batched, resumed, ""
        self.edits = tuple(edit for one in base for edit in one.edits)
        self.references = references
        sites = frozenset().union(*(one.sites for one in (*variants, *base)))
        self.stack = Stack(sites)
        self.outputs = OutputStack(sites, self.stack)
        self.prefix = Prefix(wb.model, wb.sites)
        self.sizes = [size_of(batch) for batch in batches]
        self.values = torch.full((len(variants), len(metrics), sum(self.sizes)), torch.nan, dtype=torch.float64)
        self.clean = torch.full((len(metrics), sum(self.sizes)), torch.nan, dtype=torch.float64)
        self.done = torch.zeros(len(variants), len(batches), dtype=torch.bool)
        self.identity: dict[str, Any] = {}
        self.without_cache = without_cache(wb.model)
        self.recorded: Any = None  # the output on the first batch, while what blocks gave in it is kept
        self.sparse = True  # whether logits that no metric reads are left out

    def run(self, path: Path | None, reference: Any, seed: int, progress: bool) -> Sweep:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            # Open for the whole sweep; which sites fire is checked at each forward.
            stack.enter_context(self.wb.editing(self.stack, self.outputs, must_fire=False))
            stack.enter_context(self.prefix.open())
            self._try_out()
            self.identity = identity(
                self.wb, self.variants, self.base, self.batches, self.metrics, reference, seed,
                memory=self.memory, mode=self.mode, batched=self.batched,
            )  # fmt: skip
            if path is not None:
                self._go_on(path)
            bar = tqdm(total=self.done.numel(), initial=int(self.done.sum()), disable=not progress, desc="sweep")
            with bar, kept_when_stopped(path, lambda: self._save(path), SweepInterrupted):
                self._all(path, bar)
        return self._save(path)

    @property
    def resampling(self) -> dict[str, Any]:
        """How examples were resampled, if they were."""
        drawn = [reference for reference in self.references if reference.kind.singles]
        return {"resampling": {"draws": drawn[0].draws, "seed": drawn[0].seed}} if drawn else {}

    @property
    def mode(self) -> str:
        return "resumed" if self.resumed else "full"

    def _forward(self, batch: Mapping[str, Any], size: int, plan: Sequence[tuple[Any, ...]], start: str | None) -> Any:
        """The model's output with each of the plan's edits, side by side, begun at a block."""
        times = len(plan)
        for reference in self.references:
            reference.begin(batch)
        inputs = {
            name: value if name == "cache_position" else repeat(value, times, size) for name, value in batch.items()
        }
        self.stack.plan = plan
        self.stack.touched.clear()
        places = self._places(batch)
        if places is not None:
            inputs[ARGUMENT] = places
        with self.prefix.resuming(start, times):
            output = self.wb.model(**{**self.without_cache, **inputs})
        return output if places is None else widened(output, places, batch["input_ids"].shape[1])

    def _places(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Where logits are needed; None for everywhere."""
        return places_read(self.wb.model, self.metrics.values(), batch) if self.sparse else None

    def _run_plan(
        self, batch: Mapping[str, Any], size: int, chosen: Sequence[tuple[Any, ...]], start: str | None
    ) -> list[Any]:
        """The model's output with each of the chosen edits."""
        output = self._forward(batch, size, [(*self.edits, *edits) for edits in chosen], start)
        silent = sorted(frozenset().union(*(edit.sites for edits in chosen for edit in edits)) - self.stack.touched)
        if silent:
            raise InterventionError(
                "the intervention never fired at the site", site=silent[0], hint="does the model's forward reach it?"
            )
        return split(output, len(chosen), len(chosen) * size)

    def _try_out(self) -> None:
        """Find out, on the first batch, what this model allows."""
        batch, size = self.batches[0], self.sizes[0]
        plain = self._plain(batch, size)
        recorded = self._record(batch, size) if self.resumed else self._forward(batch, size, [self.edits], None)
        if not same(plain, recorded):
            if not self.resumed or not same(plain, self._forward(batch, size, [self.edits], None)):
                raise InterventionError(
                    "the model is not deterministic: two forwards on the first batch differ",
                    hint="does it drop out, sample, or use atomic additions? "
                    "try model.eval() or torch.use_deterministic_algorithms(True)",
                )
            self._fall_back("a forward differs when its blocks are watched")
        self.recorded = recorded if self.resumed else None
        starts = self.prefix.starts
        if self.resumed and not starts:
            self._fall_back(self.prefix.reason or "no block runs exactly once")
        elif self.resumed:
            if self.prefix.reason:
                warnings.warn(f"some variants run whole forwards: {self.prefix.reason}", UserWarning, stacklevel=4)
            for start in dict.fromkeys((starts[-1], starts[len(starts) // 2])):
                if not same(plain, self._forward(batch, size, [self.edits], start)):
                    self._fall_back(f"a forward resumed at {start} does not give the same numbers")
                    break
        if self.batched and len(self.variants) > 1:
            last = starts[-1] if self.resumed else None
            wrong = self._repeats_wrongly(plain, batch, size, last)
            if wrong:
                self.batched = False
                warnings.warn(f"variants run one by one: {wrong}", UserWarning, stacklevel=4)

    def _plain(self, batch: Mapping[str, Any], size: int) -> Any:
        """The unedited model's output; finds out whether logits are the same when only those that are read are made."""
        found = self._forward(batch, size, [self.edits], None)
        places = self._places(batch)
        if places is None:
            return found
        self.sparse = False
        whole = self._forward(batch, size, [self.edits], None)
        few, all_of_them = (getattr(output, "logits", None) for output in (found, whole))
        if (
            few is None
            or all_of_them is None
            or few.shape != all_of_them.shape
            or not close(all_of_them[:, places], few[:, places])
        ):
            warnings.warn(f"all logits are computed: {ARGUMENT} changes those that are kept", UserWarning, stacklevel=5)
            return whole
        self.sparse = True
        return found

    def _repeats_wrongly(self, plain: Any, batch: Mapping[str, Any], size: int, start: str | None) -> str:
        """Why variants cannot run side by side; "" if they can."""
        try:
            parts = split(self._forward(batch, size, [self.edits] * 2, start), 2, 2 * size)
        except WorkbenchError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            return f"the model does not take a repeated batch ({type(error).__name__}: {error})"
        for part in parts:
            if not close(plain, part):
                return "a repeated batch gives other numbers, so that its examples act on one another"
        return ""

    def _fall_back(self, reason: str) -> None:
        self.resumed, self.reason = False, reason
        warnings.warn(f"the sweep runs whole forwards: {reason}", UserWarning, stacklevel=5)

    def _record(self, batch: Mapping[str, Any], size: int) -> Any:
        with self.prefix.recording(size):
            return self._forward(batch, size, [self.edits], None)

    def _go_on(self, path: Path) -> None:
        if not path.exists():
            if not path.parent.is_dir():
                raise WorkbenchError(f"there is no folder {path.parent}", hint="make the folder first")
            return
        held = Sweep.load(path)
        check_resumed(held.identity, self.identity, path.name)
        self.values, self.clean, self.done = held.values, held.clean, held.done

    def _all(self, path: Path | None, bar: Any) -> None:
        saved = time.monotonic()
        first = 0
        for number, (batch, size) in enumerate(zip(self.batches, self.sizes, strict=True)):
            rows = slice(first, first + size)
            first += size
            if bool(self.done[:, number].all()):
                continue
            clean, self.recorded = self.recorded if number == 0 else None, None
            if clean is None or not self.resumed:
                clean = self._record(batch, size) if self.resumed else self._forward(batch, size, [self.edits], None)
            self.clean[:, rows] = self._measured(clean, clean, batch, "the unedited model", rows)
            for start, chunk in self._chunks(clean):
                if bool(self.done[chunk, number].all()):
                    continue
                totals = torch.zeros(len(chunk), len(self.metrics), size, dtype=torch.float64)
                draws = [(k, edits) for k, i in enumerate(chunk) for edits in self.variants[i].draws]
                for some in (draws[at : at + len(chunk)] for at in range(0, len(draws), len(chunk))):
                    outputs = self._run_plan(batch, size, [edits for _, edits in some], start)
                    for (k, _), output in zip(some, outputs, strict=True):
                        one = self.variants[chunk[k]]
                        totals[k] += self._measured(output, clean, batch, one.label, rows) / len(one.draws)
                self.values[chunk, :, rows] = totals
                self.done[chunk, number] = True
                bar.update(len(chunk))
                if path is not None and time.monotonic() - saved > _SAVE_EVERY:
                    self._save(path)
                    saved = time.monotonic()

    def _chunks(self, clean: Any) -> list[tuple[str | None, list[int]]]:
        """Which variants run together, and from where; the same whatever is done already."""
        starts = [self.prefix.start(one.sites) if self.resumed else None for one in self.variants]
        order = {name: i for i, name in enumerate(self.prefix.starts)}
        groups: dict[str | None, list[int]] = {}
        for i in sorted(range(len(starts)), key=lambda i: -1 if starts[i] is None else order[starts[i] or ""]):
            groups.setdefault(starts[i], []).append(i)
        kept = self.prefix.kept.nbytes if self.resumed else 0
        if kept > self.memory // 2:
            raise InterventionError(
                f"the blocks' outputs for one batch take {kept / 2**20:.0f} MiB, more than half of memory=",
                hint="use smaller batches, a larger memory=, or resumed=False",
            )
        each = 12 * self.prefix.widest + 3 * sum(t.nbytes for t in tensors(clean))
        most = max(1, (self.memory - kept) // max(each, 1)) if self.batched else 1
        groups = self._paired(groups, order, most)
        return [(start, group[i : i + most]) for start, group in groups.items() for i in range(0, len(group), most)]

    def _paired(
        self, groups: dict[str | None, list[int]], order: Mapping[str, int], most: int
    ) -> dict[str | None, list[int]]:
        """Small groups with those that begin one block later: one more block costs these less than an own forward."""
        rows = self.prefix.rows if self.resumed else 0
        found: dict[str | None, list[int]] = {}
        before: str | None = None
        for start, group in groups.items():
            next_to = before is not None and start is not None and order[start] == order[before] + 1
            if next_to and len(found[before]) * rows < _FEW_ROWS and len(found[before]) + len(group) <= most:
                found[before] = found[before] + group
                before = None
            else:
                found[start] = group
                before = start
        return found

    def _measured(self, output: Any, clean: Any, batch: Mapping[str, Any], of: str, rows: slice) -> Tensor:
        """[metric, example of the batch]."""
        values = [(name, metric(output, batch, clean)) for name, metric in self.metrics.items()]
        return torch.stack([check_value(value, name, of, rows) for name, value in values])

    def _save(self, path: Path | None) -> Sweep:
        result = Sweep(
            variants=tuple(one.label for one in self.variants),
            metrics=tuple(self.metrics),
            values=self.values,
            clean=self.clean,
            done=self.done,
            batch_sizes=tuple(self.sizes),
            mode=self.mode,
            reason=self.reason,
            batched=self.batched,
            identity=self.identity,
            provenance=self.wb.provenance() | self.resampling,
        )
        if path is not None:
            result.save(path)
        return result
