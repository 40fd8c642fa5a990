"""The interventions and the capture that are open on a model, and what they make of each call while it runs."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from workbench.errors import CaptureError, InterventionError
from workbench.hooks.answering import answered
from workbench.hooks.compiled.regions import Region
from workbench.hooks.edits import Edit, OutputEdit, Threads
from workbench.hooks.layouts import Layouts
from workbench.hooks.listener import Listener
from workbench.hooks.multihead import MODULES
from workbench.hooks.observer import Observer
from workbench.hooks.placing import learn
from workbench.hooks.tap import AttentionCall
from workbench.hooks.truth import Checked
from workbench.inputs import check_numbers
from workbench.session.recorder import Recorder
from workbench.session.row_watch import RowWatch


@dataclass(frozen=True, eq=False)
class _OpenEdit:
    """An edit that is open; `thread` is the one it is kept to, None for all; `in_task`: and to the task in it."""

    edit: Edit | OutputEdit
    thread: int | None
    in_task: bool = False

    @property
    def is_here(self) -> bool:
        """Whether it acts on what runs now."""
        here = self.thread in (None, threading.get_ident())
        return here and (not self.in_task or self in _of_task.get())


_of_task: ContextVar[frozenset[_OpenEdit]] = ContextVar("edits that are kept to a task", default=frozenset())


def _is_task() -> bool:
    """Whether a task of asyncio's runs in this thread: others may run before it goes on."""
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None and asyncio.current_task() is not None


class OpenContexts(Listener):
    """One observer on a model for all that is open on it: it begins with the first, and ends with the last.

    Edits apply in the order in which they were opened, and a capture sees what they have made of each head's output,
    whichever of the two was opened first.

    Args:
        model: without the wrapper of `torch.compile`. regions: tells what of it is compiled.
    """

    def __init__(
        self, model: nn.Module, layouts: Layouts, regions: Callable[[], Sequence[Region]] = lambda: ()
    ) -> None:
        self.model, self.layouts, self._regions = model, layouts, regions
        self._edits: list[_OpenEdit] = []
        self._recorder: Recorder | None = None
        self._watches: list[RowWatch] = []
        self._taps: dict[str, set[str]] = {}  # of sites whose rows are watched: which taps saw their calls
        self._undisturbed: dict[int, tuple[_OpenEdit, ...]] = {}  # by thread: the edits that it does not see
        self.checked = Checked()  # as `RowWatch.checked`
        self._users: set[object] = set()
        self._observer: Observer | None = None
        self._lock = threading.RLock()

    @property
    def capturing(self) -> bool:
        """Whether a capture is open."""
        return self._recorder is not None

    @property
    def any(self) -> bool:
        """Whether a capture, a watch or an intervention is open."""
        return self._recorder is not None or bool(self._edits or self._watches)

    @contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """The recorder takes every call."""

        def begin() -> None:
            if self._recorder is not None:
                raise CaptureError("this Workbench is capturing already", hint="end the outer capture first")
            self._recorder = recorder

        def end() -> None:
            if self._recorder is recorder:
                self._recorder = None

        with self._observed(begin, end):
            yield

    @contextmanager
    def watching(self, watch: RowWatch) -> Iterator[None]:
        """The watch is told of every forward."""

        def begin() -> None:
            self._watches = [*self._watches, watch]

        def end() -> None:
            self._watches = [one for one in self._watches if one is not watch]

        with self._observed(begin, end):
            yield

    @contextmanager
    def editing(self, *edits: Edit | OutputEdit, threads: Threads = "all", must_fire: bool = True) -> Iterator[None]:
        """The edits apply to every call; see `Workbench.editing`."""
        if threads not in ("all", "this"):
            raise InterventionError(f'threads is "all" or "this", not {threads!r}')
        thread = threading.get_ident() if threads == "this" else None
        mine = [_OpenEdit(edit, thread, thread is not None and _is_task()) for edit in edits]

        def begin() -> None:
            for edit in edits:
                edit.fired.clear()
            if any(one.in_task for one in mine):
                _of_task.set(_of_task.get().union(mine))
            self._edits = [*self._edits, *mine]

        def end() -> None:
            self._edits = [one for one in self._edits if one not in mine]
            if any(one.in_task for one in mine):
                _of_task.set(_of_task.get().difference(mine))

        with self._observed(begin, end):
            yield
        silent = sorted(site for edit in edits for site in edit.sites - edit.fired) if must_fire else []
        if silent:
            raise InterventionError(
                f"the intervention never fired at {', '.join(silent[:5])}{' …' if len(silent) > 5 else ''}",
                site=silent[0],
                hint="call the model inside the `with`; does its forward reach the site?",
            )

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """What is open so far has no part in the forwards that this thread runs inside."""
        thread = threading.get_ident()
        before = self._undisturbed.get(thread)
        try:
            self._undisturbed[thread] = tuple(self._edits)
            yield
        finally:
            if before is None:
                self._undisturbed.pop(thread, None)
            else:
                self._undisturbed[thread] = before

    @contextmanager
    def _observed(self, begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
        """The model is observed inside. Every step may be repeated, so that an interrupt can fall on any of them."""
        user = object()
        with answered():
            try:
                with self._lock:
                    begin()
                    self._users.add(user)
                    if self._observer is None:
                        self._observer = Observer(self.model, self, self.layouts, self._regions())
                        self._observer.__enter__()
                    self._observer.follow(self.only())
                yield
            finally:
                try:
                    self._leave(user, end)
                finally:
                    self._leave(user, end)  # again, for the interrupt that broke off the first

    def _leave(self, user: object, end: Callable[[], None]) -> None:
        with self._lock:
            end()
            self._users.discard(user)
            if not self._users:
                self._stop()
            elif self._observer is not None:
                self._observer.follow(self.only())

    def _stop(self) -> None:
        if self._observer is not None:
            self._observer.__exit__(None, None, sys.exc_info()[2])
            self._observer = None

    def close(self) -> None:
        """End everything that is open, also what an interrupt has left half open."""
        with self._lock:
            self._edits, self._watches, self._recorder = [], [], None
            self._undisturbed.clear()
            self._users.clear()
            self._stop()

    # What is open for the thread that asks.

    def _mine(self) -> list[Edit | OutputEdit]:
        if not self._edits:
            return []
        hidden = self._undisturbed.get(threading.get_ident(), ())
        return [one.edit for one in self._edits if one.is_here and one not in hidden]

    def _tell_edits(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        edits = self._mine()
        named = _named(self.model, args, kwargs) if edits else {}
        for edit in edits:
            edit.on_inputs(named)

    def _recording(self) -> Recorder | None:
        return None if self._undisturbed and threading.get_ident() in self._undisturbed else self._recorder

    def _watching(self) -> list[RowWatch]:
        return [] if self._undisturbed and threading.get_ident() in self._undisturbed else self._watches

    # The observer's listener.

    def only(self) -> frozenset[str]:
        """Where nothing is open but watches of rows, their sites, once these are known to be called plainly."""
        if self._recorder is not None or self._edits or not self._watches:
            return frozenset()
        wanted = frozenset(site for watch in self._watches for site in watch.heads)
        return wanted if all(self._taps.get(site) == {"registry"} for site in wanted) else frozenset()

    def on_start(self, name: str) -> None:
        """The capture begins a forward, of which edits know no inputs yet."""
        self._tell_edits((), {})
        if (recorder := self._recording()) is not None:
            recorder.on_start(name)
        for watch in self._watching():
            watch.guarded(watch.on_start)

    def on_end(self) -> None:
        """The capture's forward is over."""
        for watch in self._watching():
            watch.guarded(watch.on_end)
        if (recorder := self._recording()) is not None:
            recorder.on_end()

    def on_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Edits are told, and the capture takes the ids."""
        if self._mine() or self._watching():
            check_numbers((*args, *kwargs.values()))
        self._tell_edits(args, kwargs)
        for watch in self._watching():
            watch.guarded(watch.on_inputs, args, kwargs)
        if (recorder := self._recording()) is not None:
            try:
                recorder.on_inputs(args, kwargs)
            except Exception as error:
                if not recorder.on_failed("", error):
                    raise

    def on_module(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The capture looks for the modules that join heads."""
        if module is self.model and isinstance(module, MODULES):  # these carry no hook that sees their inputs
            self._tell_edits(args, {})
        if (recorder := self._recording()) is not None:
            try:
                recorder.on_module(name, module, args)
            except Exception as error:
                if not recorder.on_failed("", error):
                    raise

    def follows_linear(self) -> bool:
        """While the capture has found what joins heads, and another may be beside it."""
        recorder = self._recorder
        return recorder is not None and recorder.outputs.projections.follows()

    def on_linear(self, name: str, module: nn.Module, given: Tensor) -> None:
        """The capture looks for what is beside the modules that join heads."""
        if (recorder := self._recording()) is not None:
            recorder.on_linear(name, module, given)

    def on_call(self, call: AttentionCall) -> Tensor | None:
        """The edits change what the heads give, then the capture takes it."""
        z = None
        for edit in self._mine():
            if isinstance(edit, Edit) and call.site in edit.sites:
                if z is None:
                    z = call.mixed
                    z = z if call.shard is None else call.shard.widened(z)
                z = edit(call, z)
                edit.fired.add(call.site)
        if z is not None and call.shard is not None:
            z = call.shard.narrowed(z)
        for watch in self._watching():
            if call.site in watch.heads:
                watch.guarded(watch.on_call, call)
                if call.lengths[1] > 1:  # a single key shows nothing of how it is read
                    self._taps.setdefault(call.site, set()).add(call.tap if call.axes is None else "")
        recorder = self._recording()
        if recorder is not None and not call.replay:
            try:
                recorder.on_call(call, z)
            except Exception as error:
                if not recorder.on_failed(call.site, error):
                    raise
        return z

    def on_step(self, site: str, backend: str, q: Tensor, k: Tensor, scale: float | None) -> bool:
        """It is enough for watches of rows, of a backend whose rows were seen to be these."""
        watches = self._watching()
        if self._recorder is not None or self._edits or any(watch.packed for watch in watches):
            return False
        if not self.checked.has(site, backend):
            return False
        for watch in watches:
            if site in watch.heads:
                watch.guarded(watch.on_step, site, q, k, scale)
        return True

    def cannot_wait(self, site: str) -> bool:
        """Edits cannot."""
        return any(isinstance(edit, Edit) and site in edit.sites for edit in self._mine())

    def edits_at(self, site: str) -> bool:
        """Whether one is open there."""
        return self.cannot_wait(site)

    def on_refused(self, site: str, reason: str, *, edited: bool) -> None:
        """What the capture has of the site is taken back; an edit cannot be, nor what was told of rows."""
        self._missed(site, CaptureError(f"what its kernel gives could not be placed: {reason}", site=site))
        if (recorder := self._recording()) is not None:
            recorder.on_refused(site, reason)
        if edited:
            raise InterventionError(
                f"what was edited cannot be shown to be heads: {reason}", site=site, hint=learn(site)
            )

    def on_failed(self, site: str, error: Exception) -> bool:
        """What edits cannot do is an error, and rows that cannot be told; what the capture cannot record, it decides;
        else nobody asked for it.
        """
        edited = bool(self._mine()) if not site else self.cannot_wait(site)
        if isinstance(error, InterventionError) or edited:
            return False
        self._missed(site, error)
        recorder = self._recording()
        return recorder is None or recorder.on_failed(site, error)

    def _missed(self, site: str, error: Exception) -> None:
        self._taps.setdefault(site, set()).add("")  # it is watched more widely from now on
        for watch in self._watching():
            if site in watch.heads:
                watch.guarded(watch.on_missed, site, error)

    def on_output(self, name: str, module: nn.Module, output: Any) -> Any:
        """The edits change what a module gives."""
        changed = None
        for edit in self._mine():
            if isinstance(edit, OutputEdit) and name in edit.sites:
                changed = edit(name, module, output if changed is None else changed)
                edit.fired.add(name)
        return changed

    def leaves_native_path(self) -> bool:
        """Whether a head's output must be a tensor that the model itself goes on with, and every module must run."""
        recorder = self._recording()
        return (recorder is not None and recorder.settings.gradients) or bool(self._mine())

    def wants(self, site: str) -> bool:
        """Whether someone is to see the calls of a site."""
        recorder = self._recording()
        chosen = None if recorder is None else recorder.settings.sites
        recorded = recorder is not None and (chosen is None or site in chosen)
        recorded = recorded or any(site in watch.heads for watch in self._watching())
        return recorded or any(isinstance(edit, Edit) and site in edit.sites for edit in self._mine())


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by the names of the forward's arguments; positional ones that it has no name for, by their number."""
    names = [
        name
        for name, one in inspect.signature(model.forward).parameters.items()
        if one.kind <= one.POSITIONAL_OR_KEYWORD
    ]
    names += [str(number) for number in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}
