"""Runs variants on batches: side by side in one forward, and only from the first edited block on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InterventionError, WorkbenchError
from workbench.hooks.edits import Ablation, zero
from workbench.hooks.nested import tensors
from workbench.hooks.positions import Positions
from workbench.inputs import without_cache
from workbench.metrics import Metric
from workbench.session.reference import Reference
from workbench.session.workbench import Workbench
from workbench.sweep.inputs import size_of
from workbench.sweep.kept_logits import ARGUMENT, places_read, widened
from workbench.sweep.outputs import check_value, close, same
from workbench.sweep.prefix import Prefix, exchanged, resumes_wrongly, starts_to_try
from workbench.sweep.variants import OutputStack, Resolved, Stack, Unrepeated, repeat, split

_FEW_ROWS = 256  # vectors in a forward; with fewer, what a forward costs whatever its size weighs more than a block


class Runner:
    """The variants of one sweep on one model; it can be sent to a worker, where it goes on from nothing.

    Attributes:
        batched, resumed: whether variants run side by side, and from the first edited block on; `reason` why not.
        sizes: examples of each batch.
    """

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
        self.without_cache = without_cache(wb.model)
        self.recorded: tuple[int, Any] | None = None  # of the batch whose blocks' outputs are kept, its output
        self.sparse = True  # whether logits that no metric reads are left out

    def __reduce__(self) -> tuple[Any, ...]:
        given = (self.wb, self.variants, self.base, self.references, self.batches, self.metrics)
        found = {"resumed": self.resumed, "reason": self.reason, "sparse": self.sparse}
        return Runner, (*given, self.memory, self.batched, self.resumed), found

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, variants can be run. Edits are in place all the time; which sites fire is checked at each forward."""
        with torch.no_grad(), self.wb.editing(self.stack, self.outputs, must_fire=False), self.prefix.open():
            yield
        self.recorded = None

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
        self.stack.plan, self.stack.size = plan, size
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

    def try_out(self) -> None:
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
        self.recorded = (0, recorded) if self.resumed else None
        starts = self.prefix.starts
        if self.resumed and not starts:
            self._fall_back(self.prefix.reason or "no block runs exactly once")
        elif self.resumed:
            if self.prefix.reason:
                warnings.warn(f"some variants run whole forwards: {self.prefix.reason}", UserWarning, stacklevel=3)
            why = resumes_wrongly(
                lambda: self._forward(exchanged(batch, size), size, [self.edits], None),
                lambda start: same(plain, self._forward(batch, size, [self.edits], start)),
                starts_to_try(starts),
            )
            if why:
                self._fall_back(why)
        if self.batched and len(self.variants) > 1:
            ends: list[str | None] = [starts[-1]] if self.resumed else [None]
            if self.resumed and starts[0].rpartition(".")[0] != starts[-1].rpartition(".")[0]:
                ends.append(starts[0])  # of another tower, whose examples may be others
            wrong = next(filter(None, (self._repeats_wrongly(plain, batch, size, end) for end in ends)), "")
            wrong = wrong or self._windows_are_mixed(plain, batch, size)
            if wrong:
                self.batched = False
                warnings.warn(f"variants run one by one: {wrong}", UserWarning, stacklevel=3)

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
            warnings.warn(f"all logits are computed: {ARGUMENT} changes those that are kept", UserWarning, stacklevel=4)
            return whole
        self.sparse = True
        return found

    def _repeats_wrongly(self, plain: Any, batch: Mapping[str, Any], size: int, start: str | None) -> str:
        """Why variants cannot run side by side; "" if they can."""
        try:
            both = self._forward(batch, size, [self.edits] * 2, start)
            if _rows(both) != [2 * n if n == size else n for n in _rows(plain)]:
                return "what its blocks give is not repeated along its first axis, as a batch is"
            parts = split(both, 2, 2 * size)
        except Unrepeated as error:
            return error.message
        except WorkbenchError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            return f"the model does not take a repeated batch ({type(error).__name__}: {error})"
        for part in parts:
            if not close(plain, part):
                return "a repeated batch gives other numbers, so that its examples act on one another"
        return ""

    def _windows_are_mixed(self, plain: Any, batch: Mapping[str, Any], size: int) -> str:
        """Why windows keep variants from running side by side: those of one example do not follow each other."""
        several = {self.wb.sites.find(name): (0,) for name in sorted(self.stack.windowed)}
        if not several:
            return ""
        edit = Ablation(several, zero, Positions())
        try:
            parts = split(self._forward(batch, size, [(*self.edits, edit), self.edits], None), 2, 2 * size)
        except WorkbenchError as error:
            return error.message
        if close(plain, parts[1]):
            return ""
        return f"an edit of one example's windows at {next(iter(several)).name} reaches those of another"

    def _fall_back(self, reason: str) -> None:
        self.resumed, self.reason = False, reason
        warnings.warn(f"the sweep runs whole forwards: {reason}", UserWarning, stacklevel=4)

    def _record(self, batch: Mapping[str, Any], size: int) -> Any:
        with self.prefix.recording(size):
            return self._forward(batch, size, [self.edits], None)

    def clean(self, number: int) -> tuple[Any, Tensor]:
        """The unedited model's output on a batch, and the metrics of it; what its blocks gave is kept."""
        batch, size = self.batches[number], self.sizes[number]
        if self.recorded is None or self.recorded[0] != number:
            self.recorded = None  # not beside the next one
            made = self._record(batch, size) if self.resumed else self._forward(batch, size, [self.edits], None)
            self.recorded = number, made
        found = self.recorded[1]
        return found, self._measured(found, found, batch, "the unedited model", self.rows(number))

    def rows(self, number: int) -> slice:
        """Where a batch's examples are among all."""
        first = sum(self.sizes[:number])
        return slice(first, first + self.sizes[number])

    def run(self, number: int, clean: Any, done: Tensor, part: int = 0, parts: int = 1) -> Iterator[tuple[Any, Tensor]]:
        """Variants that ran together on a batch, and their metrics [variant, metric, example of the batch].

        Args:
            clean: as `clean` gave it. done: [variant] bool, of this batch; where all that run together are done, they
                do not run again.
            part, parts: which share of them.
        """
        batch, size = self.batches[number], self.sizes[number]
        for start, chunk in self._chunks(clean)[part::parts]:
            if bool(done[chunk].all()):
                continue
            totals = torch.zeros(len(chunk), len(self.metrics), size, dtype=torch.float64)
            draws = [(k, edits) for k, i in enumerate(chunk) for edits in self.variants[i].draws]
            for some in (draws[at : at + len(chunk)] for at in range(0, len(draws), len(chunk))):
                outputs = self._run_plan(batch, size, [edits for _, edits in some], start)
                for (k, _), output in zip(some, outputs, strict=True):
                    one = self.variants[chunk[k]]
                    totals[k] += self._measured(output, clean, batch, one.label, self.rows(number)) / len(one.draws)
            yield chunk, totals

    @property
    def n_chunks(self) -> int:
        """How many forwards the variants of the first batch take, after `try_out`."""
        return len(self._chunks(self.clean(0)[0]))

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


def _rows(output: Any) -> list[int]:
    """How many rows each tensor of an output has."""
    return [tensor.shape[0] for tensor in tensors(output) if tensor.dim()]
