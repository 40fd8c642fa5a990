"""Follows the forwards of a capture, in every thread, and has each attention call recorded where it belongs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.capture.site_capture import Forward
from workbench.capture.timing import CallTimes
from workbench.capture.unrecorded import Unrecorded, is_out_of_memory, reason_of
from workbench.errors import CaptureError, WorkbenchError
from workbench.hooks.finding import site_name, with_call
from workbench.hooks.sites import Site, Sites
from workbench.hooks.tap import AttentionCall, Unshown
from workbench.hooks.truth import Checked
from workbench.inputs import check_inputs, context_length, packed_sequences, token_ids
from workbench.session.call_recorder import CallRecorder
from workbench.session.head_outputs import HeadOutputs
from workbench.session.packed import RunningForward


@dataclass(kw_only=True)
class Recorder(CallRecorder):
    """Collects the forwards of one capture; its methods are the observer's callbacks.

    `refused` says, by site, why none of its calls were kept, `unrecorded` how many were not, and why; `called` has the
    sites that made calls, wanted or not, `idle` those whose module has run in some forward without one.
    """

    model: nn.Module
    sites: Sites
    decode: Callable[[Tensor], list[list[str]]] | None = None
    refused: dict[str, str] = field(default_factory=dict)
    unrecorded: dict[str, Unrecorded] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)
    failure: WorkbenchError | None = None
    _opened_in: int = field(default_factory=threading.get_ident)
    _running: dict[int, RunningForward] = field(default_factory=dict)
    _threads: dict[int, int] = field(default_factory=dict)
    _refused_here: dict[int, set[str]] = field(default_factory=dict)  # by thread, in its present forward
    _checked: Checked = field(default_factory=Checked)  # by name of the site
    _contexts: list[int | None] = field(default_factory=list)
    _entered: dict[int, dict[str, float]] = field(default_factory=dict)
    _unstored: dict[int, list[Forward]] = field(default_factory=dict)  # by thread: over, but for their gradients
    _began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.outputs = HeadOutputs(self.arena, frozenset(site.path for site in self.sites))

    def _context(self) -> int | None:
        """The length of the model's context, looked up once: it takes a walk over all modules."""
        if not self._contexts:
            self._contexts.append(context_length(self.model))
        return self._contexts[0]

    def _now(self) -> float:
        """Seconds of the host's clock since the capture began."""
        return time.perf_counter() - self._began

    def on_start(self, name: str) -> None:
        """A forward begins in this thread."""
        self._store(threading.get_ident())
        with self._lock:
            thread = threading.get_ident()
            number = self._threads.setdefault(thread, len(self._threads))
            now = self._now()
            forward = Forward(index=len(self.forwards), thread=number, span=(now, now))
            self._entered[thread] = {}
            self._refused_here.pop(thread, None)
            self.forwards.append(forward)
            self._running[thread] = RunningForward(forward, part=bool(name))

    def on_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model was called with these inputs."""
        segments = packed_sequences(self.model, args, kwargs)
        check_inputs(self.model, args, kwargs, segments, self._context)
        running = self._running.get(threading.get_ident())
        if running is None:
            return
        running.part = False
        running.whole.ids = {name: ids.clone() for name, ids in token_ids(args, kwargs).items()}
        if segments:
            running.pack(segments)
        if self.decode is not None:
            for forward in running.forwards:
                forward.tokens = {name: self.decode(ids) for name, ids in forward.ids.items()}

    def finish(self) -> None:
        """The capture is over, and so is what has not told of its end."""
        for thread in list(self._running):
            self._end(thread)
        self._arrive()
        self._share(self.masks.settle())
        for thread in list(self._unstored):
            self._store(thread)
        if self.store is not None:
            self.forwards.sort(key=lambda forward: forward.index)  # as they were finished

    def _arrive(self) -> None:
        """What is under way to the host has come."""
        with self._lock:
            arriving, self._under_way = self._under_way, []
        if arriving:
            self._landing.wait()
            with torch.inference_mode(False), torch.no_grad():
                for each in arriving:
                    each.arrive()

    def _share(self, same: Mapping[int, Tensor]) -> None:
        """Layers whose masks have turned out to be the same share one."""
        for forward in self.forwards if same else ():
            for name, one in forward.sites.items():
                if one.lazy is not None and any(id(t) in same for t in one.lazy.state()[1].values()):
                    shared = one.lazy.kept(lambda _, t: same.get(id(t), t))
                    forward.sites[name] = replace(one, lazy=shared)

    def on_end(self) -> None:
        """The forward of this thread is over."""
        self._end(threading.get_ident())

    def _end(self, thread: int) -> None:
        try:
            self._end_running(thread)
        finally:
            self.outputs.end(thread)

    def _end_running(self, thread: int) -> None:
        running = self._running.pop(thread, None)
        self.idle.update(self._entered.get(thread, {}).keys() & {site.name for site in self.sites})
        if running is None:
            return
        if running.part and not running.whole.sites and not self._refused_here.get(thread):
            self._replace(running.whole, ())  # it has mixed no tokens, and is no forward
            return
        now = self._now()
        for forward in running.forwards:
            if forward.span is not None:
                forward.span = (forward.span[0], now)
            calls = Counter(capture.site.path for capture in forward.sites.values())
            for name, capture in forward.sites.items():
                if calls[capture.site.path] > 1:
                    forward.sites[name] = replace(capture, n_calls=calls[capture.site.path])
            if self.settings.z:
                for name, capture in forward.sites.items():
                    entering = capture.entering is not None
                    known = self.outputs.projections.of(capture.site.path, entering=entering, thread=thread)
                    forward.sites[name] = replace(capture, projection=known)
        if running.sequences:
            self._replace(running.whole, running.ended())
        if self.store is not None:
            over = running.ended() if running.sequences else [running.whole]
            self._unstored.setdefault(thread, []).extend(over)
            if not self.settings.gradients:  # these come after the forward, so that it waits for the next one
                self._store(thread)

    def _store(self, thread: int) -> None:
        """The forwards of a thread that are over go to the store, and their tensors out of memory.

        What could not be written stays in memory.

        Raises:
            FileError: it cannot be written, and this is the thread that opened the capture.
        """
        over = self._unstored.pop(thread, ())
        if over:
            self._arrive()
        for forward in over:
            assert self.store is not None
            projections = {name: one.projection for name, one in forward.sites.items()}
            try:
                stored = self.store.add(forward, projections if self.settings.z else {})
            except WorkbenchError as error:
                if threading.get_ident() == self._opened_in:
                    raise
                self.failure = self.failure or error
                continue
            with self._lock:
                at = next(i for i in reversed(range(len(self.forwards))) if self.forwards[i] is forward)
                self.forwards[at] = stored
                held = sum(one.nbytes for one in forward.sites.values())
                self.nbytes = max(0, self.nbytes - held) if self._running or self._unstored else 0

    def _replace(self, whole: Forward, forwards: Sequence[Forward]) -> None:
        """These take the place of a forward among the others."""
        with self._lock:
            at = next(i for i in reversed(range(len(self.forwards))) if self.forwards[i] is whole)
            self.forwards[at : at + 1] = forwards
            for i in range(at, len(self.forwards)):
                self.forwards[i].index = i

    def on_module(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module is about to run."""
        self._entered.setdefault(threading.get_ident(), {})[site_name(name)] = self._now()
        running = self._running.get(threading.get_ident())
        added = self.outputs.saw_module(name, module, args, None if running is None else running.whole)
        if added:
            with self._lock:
                self.nbytes += added

    def on_linear(self, name: str, module: nn.Module, given: Tensor) -> None:
        """A linear function is about to be applied to this."""
        self.outputs.projections.saw_linear(name, module, given)

    def on_call(self, call: AttentionCall, edited: Tensor | None = None) -> None:
        """Stream the statistics of one attention call and keep what was asked for.

        Args:
            edited: [batch, head, query, width] that an intervention has made of the heads' output.
        """
        thread = threading.get_ident()
        running = self._running.get(thread)
        if running is None:  # the capture was opened while this thread was inside a forward
            return
        if call.site in self._refused_here.get(thread, ()):
            return  # another of its calls in this forward cannot be shown
        if call.joined > 1 and self.settings.gradients:
            raise CaptureError(
                f"its map comes from {call.joined} calls, whose gradients are not read",
                site=call.site,
                hint="leave the site out: sites=, or capture without gradients=True",
            )
        seen = self._now()
        entered = self._entered.get(thread, {}).pop(call.site, None)
        self.called.add(call.site)
        known = self._site(call)
        if self.settings.sites is not None and known.path not in self.settings.sites:
            return
        device, grad_is_on = call.v.device.type, torch.is_grad_enabled()
        # The user may run under inference_mode or autocast; the statistics must be ordinary tensors in full precision.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            checked = list[tuple[AttentionCall, str]]()
            for forward, part in running.parts(call):
                site = known.at_call(sum(one.site.path == call.site for one in forward.sites.values()))
                due = self._checked.is_due(part, site.name)
                capture, size = self.record(part, site, forward, edited, grad_is_on, check=due)
                checked += [(part, site.name)] if due else []
                times = CallTimes(entered, seen, self._now() - seen, size)
                forward.sites[site.name] = replace(capture, times=times)
            for one, name in checked:
                self._checked.add(one, name)

    def on_refused(self, site: str, reason: str) -> None:
        """Calls of a site are not what they were told to be: nothing of them is kept."""
        self.refused[site] = reason
        self._take_back(site)

    def on_failed(self, site: str, error: Exception) -> bool:
        """A call was not recorded, for this error; "" where the model's inputs could not be taken.

        Returns:
            Whether the forward goes on without it: always in a thread that did not open the capture, whose requests
            are no business of ours; in that thread where no map can show the call, memory ran out, or nobody asked for
            the site.
        """
        wanted = not site or self.settings.sites is None or site in self.settings.sites
        goes_on = isinstance(error, Unshown) or is_out_of_memory(error)
        if wanted and threading.get_ident() == self._opened_in and not goes_on:
            return False
        if wanted:
            reason = reason_of(error)
            with self._lock:
                before = self.unrecorded.get(site)
                self.unrecorded[site] = Unrecorded(site, 1, reason) if before is None else before.once_more()
        self._take_back(site)
        return True

    def _take_back(self, site: str) -> None:
        """Nothing of a site is kept in the forward of this thread."""
        self._refused_here.setdefault(threading.get_ident(), set()).add(site)
        running = self._running.get(threading.get_ident())
        for forward in () if running is None else running.forwards:
            for name in [name for name, one in forward.sites.items() if one.site.path == site]:
                self.nbytes -= forward.sites.pop(name).nbytes

    def _site(self, call: AttentionCall) -> Site:
        with self._lock:
            self.sites = with_call(self.sites, call)
            known = self.sites.find(call.site)
        return known
