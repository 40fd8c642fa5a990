"""What the taps see, told to a listener, and what the model goes on with.

The way of a call: a tap (`sdpa`, `registry`, `written_out`, `multihead`, or a reader) brings it to `_saw_…` below,
`calls` makes an `AttentionCall` of it, `_tell` hands that to the one `Listener`, and what the listener gives goes back
into the model. The listener of a workbench is `session.open_contexts`, which edits the call and hands it to the
recorder.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError, InterventionError
from workbench.hooks import calls, cut_weights, registry
from workbench.hooks.blocks import gather
from workbench.hooks.compiled.calls import of_recorded
from workbench.hooks.compiled.graph import place
from workbench.hooks.compiled.operator import Recorded
from workbench.hooks.compiled.regions import EAGER, Region
from workbench.hooks.compiled.watched import Watched
from workbench.hooks.finding import site_name
from workbench.hooks.forwards import check_plain
from workbench.hooks.kernel_watch import LseWatch
from workbench.hooks.layouts import Layouts
from workbench.hooks.linear import projected
from workbench.hooks.listener import Listener
from workbench.hooks.narrow import UNWATCHED, Narrow
from workbench.hooks.paged import PagedKeys
from workbench.hooks.placing import UNKNOWN, learn
from workbench.hooks.readers import Reader, before_reading, check_gradients, in_place_of, read_module, reader_of
from workbench.hooks.running import ThreadRun
from workbench.hooks.sdpa import FunctionTap
from workbench.hooks.tap import AttentionCall
from workbench.hooks.waiting import Unplaced, Waiting
from workbench.hooks.written_out import WrittenOut
from workbench.kernels.history import differentiable

Settled = Sequence[tuple[Waiting, AttentionCall | str]]


class Telling:
    """Tells a listener what the taps see while modules of `model` run; `Observer` says which do.

    Args:
        model: calls outside it are ignored.
        listener: is told of each call, in the thread that made it.
        layouts: what is known of the axes of its kernel calls, and is added to.
    """

    _watched: Watched | None = None

    def __init__(self, model: nn.Module, listener: Listener, layouts: Layouts) -> None:
        self._model, self._listener, self._layouts = model, listener, layouts
        self._proved: set[str] = set()  # sites of readers whose gradients have been compared
        self._by_weights: dict[str, bool] = {}  # whether a backend's own weights are what it computes; else q·k is
        self._names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        found = ((module, reader_of(module)) for module in self._names)
        self._readers: dict[nn.Module, Reader] = {module: reader for module, reader in found if reader is not None}
        self._threads: dict[int, ThreadRun] = {}
        self._narrow: Narrow | None = None
        self._cut = cut_weights.is_cut(model)

    def _state(self, frame: FrameType | None) -> ThreadRun:
        """What runs in this thread, as seen from a frame; a new one if nothing does."""
        thread = threading.get_ident()
        known = self._threads.get(thread)
        if known is not None and known.drop_ended(frame) and not known.stack and known.scope is None:
            self._end(known)
            known = None
        if known is not None:
            return known
        tap = FunctionTap(
            self._saw_sdpa, self._saw_function, self._saw_written_out, self._saw_linear, self._layouts.saw_made
        )
        state = self._threads[thread] = ThreadRun(tap, self._saw_backend)
        return state

    def _is_running(self) -> bool:
        """Whether the model itself is, in this thread."""
        return any(running.module is self._model for running in self._state(sys._getframe()).stack)

    def _pop(self, state: ThreadRun) -> None:
        ended = state.stack.pop()
        if ended.native or not state.stack:
            state.settle()
        if not state.stack and state.scope is None:
            self._end(state)

    def _end(self, state: ThreadRun) -> None:
        self._threads.pop(threading.get_ident(), None)
        state.tap.shut = True  # what an interrupt has torn may end later, and would put it on again
        self._layouts.drop()
        if not state.replay:
            self._listener.on_end()

    # What the taps see: each gives what the model goes on with, or None for what it has.

    def _saw_sdpa(self, given: dict[str, Any], output: Tensor, watch: LseWatch) -> Tensor | None:
        return self._tell(lambda owner: calls.of_sdpa(owner, given, output, watch))

    def _saw_function(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> Tensor | None:
        return self._tell(lambda owner: calls.of_function(owner, function, args, kwargs, result))

    def _saw_written_out(self, found: WrittenOut) -> Tensor | None:
        return self._tell(lambda owner: calls.of_written_out(owner, found))

    def _saw_backend(
        self, backend: str, function: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        known = self._threads.get(threading.get_ident())
        if known is not None and known.narrow and known.stack:
            return self._saw_narrow(known, backend, function, module, args, kwargs)
        state = self._state(sys._getframe())
        if not state.stack:
            return function(module, *args, **kwargs)
        paged = PagedKeys.within(kwargs)
        with state.tap.away() if registry.is_flex(function) else state.tap.inside() as inner:
            result = function(module, *args, **(kwargs if paged is None else kwargs | {"cache": paged.cache}))
        name = self._names.get(module)

        def made(owner: calls.Owner) -> AttentionCall:
            call = calls.of_backend(owner, backend, module, args, kwargs, result[0], inner, paged)
            given = result[1] if len(result) > 1 and self._by_weights.get(owner[0], True) else None
            found = None if given is None else calls.by_its_weights(call, given)
            if call.lengths[1] > 1:  # a single key has all the weight, whatever its score
                self._by_weights[owner[0]] = found is not None
            return call if found is None else found

        replaced = self._tell(made, None if name is None else (site_name(name), module))
        return result if replaced is None else (replaced, *result[1:])

    def _saw_narrow(
        self, state: ThreadRun, backend: str, function: Any, module: nn.Module, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """A backend is called; its axes, and how many heads it has, were seen to be the usual ones."""
        site = None if self._narrow is None else self._narrow.sites.get(module)
        if site is None:
            return function(module, *args, **kwargs)
        paged = PagedKeys.within(kwargs)
        result = function(module, *args, **(kwargs if paged is None else kwargs | {"cache": paged.cache}))
        state.called.add(module)
        try:
            check_plain(result[0], site)
            step = None if state.replay else registry.plain_step(args, kwargs)
            if step is not None and self._listener.on_step(site, backend, *step):
                return result
            call = calls.of_backend((site, module), backend, module, args, kwargs, result[0], UNWATCHED, paged)
            z = self._listener.on_call(replace(call, replay=True) if state.replay else call)
            return result if z is None else (call.as_output(z), *result[1:])
        except Exception as error:
            if not self._listener.on_failed(site, error):
                raise
            return result

    def _saw_recorded(self, region: Region, given: Recorded, fired: set[int]) -> None:
        assert self._watched is not None
        state = self._state(sys._getframe())
        if not state.stack:
            return
        try:
            found = self._watched.owner(region, given, fired)
        except CaptureError as error:
            if not self._listener.on_failed(error.site or "", error):
                raise
            return
        owner, joins = (state.owner, None) if found is None else found
        if self._tell(lambda owner: of_recorded(owner, place(given.place), given, joins), owner) is not None:
            raise InterventionError("it runs in compiled code, and cannot be edited there", site=owner[0], hint=EAGER)

    def _saw_linear(self, func: Any, args: Sequence[Any]) -> Tensor | None:
        waiting, learning, told = self._layouts.is_waiting, self._layouts.learning, self._listener.follows_linear()
        p = projected(func, args) if waiting or learning or told else None
        if waiting and p is not None:
            self._prove(p)
        if told and p is not None and (state := self._state(sys._getframe())).stack:
            self._listener.on_linear(state.stack[-1].name, state.stack[-1].module, p)
        return p if learning else None

    def _prove(self, p: Tensor, module: nn.Module | None = None) -> None:
        """Calls that have waited for a proof are told once it has come: with the input of a projection, or with what a
        module gives.
        """
        p = cut_weights.here(p)
        layouts, state = self._layouts, self._state(sys._getframe())
        self._learn(state, lambda: layouts.saw_linear(p) if module is None else layouts.saw_output(module, p))

    def _learn(self, state: ThreadRun, learn: Callable[[], Settled]) -> None:
        try:
            with state.tap.away():
                settled = learn()
            self._settle(state, settled)
        except Exception as error:
            site = getattr(error, "site", None)  # "" is the model itself
            if not self._listener.on_failed(state.owner[0] if site is None else site, error):
                raise

    def _settle(self, state: ThreadRun, settled: Settled) -> None:
        """Tell of calls whose axes have become known, or will not."""
        with state.tap.away():
            for waiting, found in settled:
                if isinstance(found, str):
                    self._listener.on_refused(waiting.call.site, found, edited=waiting.edited)
                elif not state.replay:
                    split = cut_weights.split(found) if self._cut else found
                    if (call := self._whole(state, split)) is not None:
                        self._listener.on_call(call)

    def _tell(
        self, make: Callable[[calls.Owner], AttentionCall | Unplaced | None], owner: calls.Owner | None = None
    ) -> Tensor | None:
        """Hand a call to the listener, and give the new output of the kernel, or None.

        Args:
            make: makes the call, from the module that made it: `owner`, by default the innermost one that runs.
        """
        state = self._state(sys._getframe())
        if not state.stack:
            return None  # a forward that was broken off has left the tap
        owner = owner or state.owner
        if owner[1] in self._readers:
            return None  # it is a part of what the reader tells
        state.entries.add(state.stack[0].name)
        try:
            return self._make_and_tell(state, make, owner)
        except Exception as error:
            if not self._listener.on_failed(owner[0], error):
                raise
            return None

    def _make_and_tell(
        self, state: ThreadRun, make: Callable[[calls.Owner], AttentionCall | Unplaced | None], owner: calls.Owner
    ) -> Tensor | None:
        with state.tap.away():  # an edit may itself take a softmax and multiply
            made = make(owner)
            if made is None:
                return None
            check_plain(made.output, owner[0])
            if isinstance(made, Unplaced) and self._cut:
                made = cut_weights.with_heads_here(made)
            blocks = self._listener.takes_blocks()
            call, waiting = self._layouts.place(made, blocks=blocks) if isinstance(made, Unplaced) else (made, None)
            if call is None and waiting is not None and self._listener.cannot_wait(owner[0]):
                call = self._layouts.assume(waiting)
                if call is None:
                    raise InterventionError(UNKNOWN, site=owner[0], shape=waiting.output.shape, hint=learn(owner[0]))
            if call is None:
                return None
            if self._cut:
                call = cut_weights.split(call)
            if call.tap == "registry":
                call = self._layouts.of_registry(call)
            if call.tap == "registry" and (reason := self._layouts.refusal(call)) is not None:
                self._listener.on_refused(call.site, reason, edited=self._listener.cannot_wait(call.site))
                return None
            if state.replay:
                call = replace(call, replay=True)
            whole = self._whole(state, call)
            z = None if whole is None else self._listener.on_call(whole)
            if z is None:
                return None
            output = call.as_output(z)
            if waiting is not None:
                waiting.watch(output)
                waiting.edited = True
            return output

    def _whole(self, state: ThreadRun, call: AttentionCall) -> AttentionCall | None:
        """The call, or where it is one of several blocks, all of them as one call once they are there."""
        if (windows := self._windows(state, call)) != call.windows:
            call = replace(call, windows=windows)
        call = self._layouts.aligned(call)
        if call.block is None or self._listener.takes_blocks():
            return call
        return gather(state.blocks, call, call.block)

    @staticmethod
    def _windows(state: ThreadRun, call: AttentionCall) -> int:
        """How many entries the call's batch has for each example that the model was given."""
        n, examples = call.v.shape[0], state.examples
        return n // examples if examples and n > examples and n % examples == 0 else 1

    def _tell_native(self, state: ThreadRun, call: AttentionCall) -> None:
        """On a native path there is nothing to put in the place of what the heads give."""
        call = self._layouts.aligned(call)
        self._listener.on_call(replace(call, replay=True) if state.replay else call)

    def _before_reading(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Whether a module goes on from a cached state can only be told before it runs."""
        state = self._threads.get(threading.get_ident())
        if state is not None and state.stack and not state.reading and self._listener.wants(state.owner[0]):
            try:
                state.stack[-1].begun = before_reading(module, args, kwargs)
            except Exception as error:
                if not self._listener.on_failed(state.owner[0], error):
                    raise

    def _saw_mixing(self, state: ThreadRun, args: Any, kwargs: Any, output: Any) -> Any:
        """A module that has a reader has run; its new output, or None."""
        name = state.owner[0]
        if not self._listener.wants(name):
            return None
        try:
            return self._read_and_tell(state, args, kwargs, output)
        except Exception as error:
            if not self._listener.on_failed(name, error):
                raise
            return None

    def _read_and_tell(self, state: ThreadRun, args: Any, kwargs: Any, output: Any) -> Any:
        name, module = state.owner
        if self._cut:
            cut_weights.check_whole(module, name)
        state.reading = True
        try:
            with_history = torch.is_grad_enabled() and self._listener.edits_at(name)
            history = differentiable() if with_history else torch.no_grad()
            with state.tap.away(), history:
                call = read_module(name, module, args, kwargs, output, begun=state.stack[-1].begun)
                call = replace(call, windows=self._windows(state, call))
                if with_history and call.output.requires_grad and name not in self._proved:
                    check_gradients(call, args, kwargs)
                    self._proved.add(name)
                z = self._listener.on_call(replace(call, replay=state.replay))
                edited = None if z is None else call.as_output(z)
        finally:
            state.reading = False
        return None if edited is None else in_place_of(call, edited, output)
