"""Observe the attention calls of a model: which module made each, in every thread, with nothing left behind.

PyTorch's process-wide module hooks keep a stack of the running modules. They are used rather than hooks on each module
because modules change their path when they carry hooks, and because a copied or pickled model must carry none.

What the taps see meanwhile is told in `telling`.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from workbench.errors import CaptureError
from workbench.hooks import bridges, flex, multihead, registry
from workbench.hooks.compiled.regions import Region
from workbench.hooks.compiled.watched import Watched
from workbench.hooks.finding import site_name
from workbench.hooks.forwards import InputsHook, calling_method, entries_of, examples_of
from workbench.hooks.layouts import Layouts
from workbench.hooks.listener import Listener
from workbench.hooks.modes import close_torn
from workbench.hooks.narrow import AGAIN, BeginHook, Hook, Narrow
from workbench.hooks.nested import first_tensor
from workbench.hooks.projections import is_linear
from workbench.hooks.readers import reader_of
from workbench.hooks.running import Running, ThreadRun
from workbench.hooks.telling import Telling

ANEW = "close the `with` before it, and open it again after"
HOST = "torch.set_default_device('cpu'), or leave the `with torch.device(...)`; the model may stay where it is"


class Observer(Telling):
    """Tells a listener what runs inside `model`, from `__enter__` to `__exit__`; both may be repeated.

    Whoever opens one calls `__exit__` whatever happens, also where `__enter__` was broken off; `observed` does so.

    Args:
        model: the module to watch; calls outside it are ignored.
        listener: is told of each call, in the thread that made it.
        layouts: what is known of the axes of its kernel calls, and is added to; by default nothing.
        regions: what of the model is compiled, and is to be compiled once more with what records its attention.

    Raises:
        CaptureError: what is compiled cannot be watched.
    """

    def __init__(
        self, model: nn.Module, listener: Listener, layouts: Layouts | None = None, regions: Sequence[Region] = ()
    ) -> None:
        super().__init__(model, listener, Layouts() if layouts is None else layouts)
        self._hooks: list[Hook] = []  # where inputs come in, and where a reader reads
        self._tellers: list[Hook] = []  # of modules as they begin and end
        self._only = frozenset[str]()
        self._foreign = weakref.WeakSet[nn.Module]()
        self._lock, self._open = threading.RLock(), False  # one thread at a time exchanges hooks
        self._watched = Watched(model, regions, self._run_compiled) if regions else None
        self._eager = self._names if self._watched is None else self._watched.eager
        self._flex = flex.namespaces(self._eager)
        self._bridge = bridges.Whole(model, self._is_running)

    def __enter__(self) -> Observer:
        if not self._hooks:
            self._hooks, self._tellers = list(self._where_inputs_come()), list(self._where_modules_run())
        if self._eager:  # what is compiled would be compiled anew with what stands in the place of functions
            registry.install(self)
            flex.install(self, self._flex)
            self._bridge.open()
        if self._watched is not None:
            self._watched.open()
        self._open = True
        for where, key, hook in (*self._hooks, *self._tellers):
            where[key] = hook
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._open = False
            for where, key, _ in (*self._hooks, *self._tellers):
                where.pop(key, None)
        if self._watched is not None:
            self._watched.close()
        self._bridge.close()
        registry.uninstall(self)
        flex.uninstall(self)
        close_torn(trace)
        for state in list(self._threads.values()):
            state.tap.shut = True  # another thread may be in the middle of a forward
        mine = self._threads.get(threading.get_ident())
        if mine is not None:  # an interrupt skips the hooks that would have done this
            mine.stack.clear()
            mine.settle()
        self._threads.clear()

    def follow(self, only: frozenset[str]) -> None:
        """From now on nothing but these sites is watched, whose calls come through Hugging Face's registry; none: all.

        In a thread that is inside a forward what does not come through the registry is watched from the next one on.
        """
        with self._lock:
            if only == self._only or not self._open:
                return
            narrow = Narrow(self._names, only) if only and self._watched is None and not self._cut else None
            self._only, self._narrow = only, narrow if narrow is not None and narrow.is_enough else None
            before, wanted = self._tellers, list(self._where_modules_run())
            self._tellers = [*before, *wanted]  # an interrupt may fall on any of these steps
            for where, key, hook in wanted:
                where[key] = hook
                if isinstance(hook, BeginHook) and isinstance(where, OrderedDict):
                    where.move_to_end(key, last=False)  # a module begins before its inputs are told of
            for where, key, _ in before:
                where.pop(key, None)
            self._tellers = wanted

    def _where_modules_run(self) -> Iterator[Hook]:
        """Hooks that tell of modules as they begin and end; to take one out nothing is needed but its key.

        A module's hooks have another key than those of the process, which would else be taken for the module's own.
        """
        key = RemovableHandle(OrderedDict()).id
        if self._narrow is not None:
            yield from self._narrow.hooks(self._begin, self._finish_narrow, self._runs)
        elif self._watched is None:
            yield torch_module._global_forward_hooks_with_kwargs, key, True
            yield torch_module._global_forward_hooks_always_called, key, True
            yield torch_module._global_forward_pre_hooks, key, self._begin
            yield torch_module._global_forward_hooks, key, self._finish
        else:
            yield from ((where, key, hook) for where, hook in self._watched.hooks(self._begin, self._finish))

    def _where_inputs_come(self) -> Iterator[Hook]:
        """Hooks on the model, and on what has a reader."""
        told: dict[nn.Module, list[Callable[..., None]]] = {}
        for entry in entries_of(self._model):
            if entry in self._eager:
                told[entry] = [self._inputs]
        for module in self._readers:
            if module in self._eager:
                told.setdefault(module, []).append(self._before_reading)
        key = RemovableHandle(OrderedDict()).id
        for module, tell in told.items():
            yield module._forward_pre_hooks_with_kwargs, key, True
            yield module._forward_pre_hooks, key, InputsHook(tell)

    # Modules begin and end.

    def _begin(self, module: nn.Module, args: Any, frame: FrameType | None = None, *, may_narrow: bool = True) -> None:
        name = self._names.get(module)
        if name is None:
            name = self._name_of_new(module)
        if name is None:
            return
        frame = sys._getframe(1) if frame is None else frame
        state = self._state(frame)
        if state.reading or (state.stack and state.stack[-1].frame is frame and state.stack[-1].module is module):
            return  # in the latter case hooks are being exchanged
        first = not state.stack and not self._goes_on(state, name, module, frame)
        if first:
            self._check_surroundings()
            if may_narrow:
                self.follow(self._listener.only())
            state.narrow = self._narrow is not None
        running = Running(name, module, frame)
        if isinstance(module, multihead.MODULES) and not state.native and not self._listener.leaves_native_path():
            running.native = True  # it would leave its native path under a function mode
            state.watch = multihead.watch(lambda: state.owner, lambda call: self._tell_native(state, call))
        state.stack.append(running)
        if len(state.stack) == 1:
            state.replay = torch._C._current_graph_task_id() != -1
        if len(state.stack) == 1 or running.native:
            state.settle()
        if first:
            self._layouts.begin()
        elif self._layouts.is_waiting and is_linear(module) and args and isinstance(args[0], Tensor):
            self._prove(args[0])  # before the listener is told of the module
        if state.replay:
            return
        if first:
            self._listener.on_start(name)
        self._listener.on_module(name, module, args)

    def _name_of_new(self, module: nn.Module) -> str | None:
        """The name of a module that was put into the model since; None if it is none of its modules."""
        state = self._threads.get(threading.get_ident())
        if state is None or not state.stack or module in self._foreign:
            return None
        new = {one: name for name, one in self._model.named_modules() if one not in self._names}
        if module not in new:
            self._foreign.add(module)
        for one, name in new.items():
            if reader_of(one) is not None:
                self._raise(CaptureError("it was put into the model after the `with` was opened", site=name, hint=ANEW))
        self._names.update(new)
        return new.get(module)

    def _check_surroundings(self) -> None:
        """Tensors that are made here are to be on the host, and numbers to be numbers."""
        if torch._C._get_tracing_state() is not None:
            self._raise(CaptureError("the model is being traced, its numbers stand for others", hint=ANEW))
        elif torch.get_default_device().type != "cpu":
            self._raise(
                CaptureError(f"PyTorch makes tensors on {torch.get_default_device()} here by itself", hint=HOST)
            )

    def _raise(self, error: CaptureError) -> None:
        if not self._listener.on_failed(error.site or "", error):
            raise error

    def _goes_on(self, state: ThreadRun, name: str, module: nn.Module, frame: FrameType) -> bool:
        """Whether a module that begins while none runs belongs to the forward that ran before.

        It does where a method of the model, such as `forward_features`, calls one part after the other. A part that
        has mixed tokens and runs again begins a new forward, as a step of generation does.
        """
        scope = None if module is self._model else calling_method(frame, module, self._names)
        if scope is not None and scope is state.scope and name not in state.entries:
            return True
        if state.scope is not None and not state.replay:
            self._listener.on_end()
        state.scope, state.entries = scope, set()
        return False

    def _finish(self, module: nn.Module, args: Any, *rest: Any) -> Any:
        """`rest` is (keyword inputs, output); after an exception PyTorch leaves out the first."""
        state = self._threads.get(threading.get_ident())
        if state is None or state.reading or all(running.module is not module for running in state.stack):
            return None
        while state.stack[-1].module is not module:
            self._pop(state)
        try:
            if len(rest) != 2 or rest[1] is None:
                return None
            if self._layouts.is_waiting and (given := first_tensor(rest[1])) is not None:
                self._prove(given[0], module)
            if len(state.stack) == 1 and not state.replay:
                self._learn(state, self._layouts.end)
            mixed = self._saw_mixing(state, args, *rest) if module in self._readers else None
            output = self._listener.on_output(state.stack[-1].name, module, rest[1] if mixed is None else mixed)
            return mixed if output is None else output
        finally:
            self._pop(state)

    # Where only some sites are watched.

    def _runs(self, module: nn.Module, args: Any, frame: FrameType) -> None:
        """One of them is about to run."""
        state = self._threads.get(threading.get_ident())
        if state is None or not state.stack:  # it is called by itself, or a part of the model that no hook is on
            self.follow(frozenset())
            self._begin(module, args, frame, may_narrow=False)
        else:
            state.ran.append(module)

    def _finish_narrow(self, module: nn.Module, output: Any) -> None:
        """As `_finish`: what of the sites has run has made its call by now."""
        state = self._threads.get(threading.get_ident())
        if state is None or all(running.module is not module for running in state.stack):
            return
        while state.stack[-1].module is not module:
            self._pop(state)
        try:
            if state.narrow and output is not None and len(state.stack) == 1:
                for one in state.ran:
                    if one not in state.called:
                        site = site_name(self._names[one])
                        error = CaptureError("its call did not come the way it did before", site=site, hint=AGAIN)
                        if not self._listener.on_failed(site, error):
                            raise error
        finally:
            self._pop(state)

    def _inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        state = self._threads.get(threading.get_ident())
        if state is not None and not state.replay and not state.reading and len(state.stack) == 1:
            state.examples = examples_of(args, kwargs)
            self._layouts.inputs(state.examples)
            self._listener.on_inputs(args, kwargs)

    def _run_compiled(self, region: Region, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A compiled callable of the model is called: what records runs in its place."""
        assert self._watched is not None
        module, given, frame = region.runs, args[len(region.bound) :], sys._getframe()
        if module is not None:
            self._begin(module, given, frame)
            if module in entries_of(self._model):
                self._inputs(module, given, kwargs)
        state = self._state(frame)
        fired = set[int]()
        if not state.stack or state.reading:
            return region.compiled(*args, **kwargs)  # whoever calls is none of the model's modules
        try:
            with (
                state.compiled_code(),
                self._watched.graphs(region, lambda given: self._saw_recorded(region, given, fired)) as run,
            ):
                output = run(*args, **kwargs)
        except Exception:
            if module is not None:
                self._finish(module, given, None)
            raise
        if module is not None:
            self._finish(module, given, kwargs, output)
        return output


@contextmanager
def observed(model: nn.Module, listener: Listener, layouts: Layouts | None = None) -> Iterator[None]:
    """The listener is told of what runs inside; nothing is left after it, whatever happens."""
    observer = Observer(model, listener, layouts)
    try:
        observer.__enter__()
        yield
    finally:
        trace = sys.exc_info()[2]
        try:
            observer.__exit__(None, None, trace)
        finally:
            observer.__exit__(None, None, trace)  # again, for the interrupt that broke off the first
