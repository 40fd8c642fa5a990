"""Observe the attention calls of a model: which module made each, in every thread, with nothing left behind.

PyTorch's process-wide module hooks keep a stack of the running modules. They are used rather than hooks on each module
because modules change their path when they carry hooks, and because a copied or pickled model must carry none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from workbench.hooks import multihead
from workbench.hooks.kernel_watch import LseWatch
from workbench.hooks.sdpa import FunctionTap
from workbench.hooks.tap import AttentionCall


@dataclass
class _Frame:
    """One running module, and what its end has to undo."""

    name: str
    module: nn.Module
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


@dataclass
class _Thread:
    """What is running in one thread."""

    tap: FunctionTap
    stack: list[_Frame] = field(default_factory=list)


class Observer:
    """A context in which the attention calls inside `model` are reported.

    Args:
        model: the module to watch; calls outside it are ignored.
        on_call: takes each attention call, in the thread that made it. What it raises leaves through the model's
            forward.
        on_start: called when the outermost module of a forward begins, with that module's name.
        on_end: called when it ends, also by an exception.
        on_inputs: called with the keyword and positional inputs when the model itself is called, before it runs.
    """

    def __init__(
        self,
        model: nn.Module,
        on_call: Callable[[AttentionCall], None],
        on_start: Callable[[str], None] = lambda name: None,
        on_end: Callable[[], None] = lambda: None,
        on_inputs: Callable[[tuple[Any, ...], Mapping[str, Any]], None] = lambda args, kwargs: None,
    ) -> None:
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._on_call, self._on_start, self._on_end, self._on_inputs = on_call, on_start, on_end, on_inputs
        self._threads: dict[int, _Thread] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Observer:
        self._handles = [
            torch_module.register_module_forward_pre_hook(self._begin),
            torch_module.register_module_forward_hook(self._finish, always_call=True),
        ]
        if not isinstance(self._model, multihead.MODULES):  # those change their path when they carry a hook
            self._handles.append(self._model.register_forward_pre_hook(self._inputs, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        state = self._threads.get(threading.get_ident())
        while state is not None and state.stack:  # an interrupt skips the hooks that would have done this
            self._pop(state)
        self._threads.clear()

    def _state(self) -> _Thread:
        return self._threads.setdefault(threading.get_ident(), _Thread(FunctionTap(self._saw_sdpa, self._saw_kernel)))

    def _inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._on_inputs(args, kwargs)

    def _begin(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(module)
        if name is None:
            return
        state = self._state()
        frame = _Frame(name, module)
        outermost, native = not state.stack, any(isinstance(f.module, multihead.MODULES) for f in state.stack)
        state.stack.append(frame)
        if outermost:
            state.tap.__enter__()
            frame.undo.callback(state.tap.__exit__, None, None, None)
            self._on_start(name)
        if isinstance(module, multihead.MODULES) and not native:
            state.tap.__exit__(None, None, None)  # they leave their native path under a function mode
            frame.undo.callback(state.tap.__enter__)
            frame.undo.enter_context(multihead.watch(lambda: self._owner(state), self._on_call))

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        state = self._threads.get(threading.get_ident())
        if state is None or all(frame.module is not module for frame in state.stack):
            return
        while self._pop(state) is not module:
            pass

    def _pop(self, state: _Thread) -> nn.Module:
        frame = state.stack.pop()
        frame.undo.close()
        if not state.stack:
            self._on_end()
        return frame.module

    @staticmethod
    def _owner(state: _Thread) -> tuple[str, nn.Module]:
        return state.stack[-1].name, state.stack[-1].module

    def _saw_sdpa(self, given: dict[str, Any], output: Tensor, watch: LseWatch) -> None:
        name, module = self._owner(self._state())
        self._on_call(
            AttentionCall(
                site=name,
                module=module,
                q=given["query"],
                k=given["key"],
                v=given["value"],
                mask=given["attn_mask"],
                is_causal=given["is_causal"],
                scale=given["scale"],
                dropout=given["dropout_p"],
                output=output,
                lse=watch.lse,
                kernel=watch.kernel,
                tap="sdpa",
            )
        )

    def _saw_kernel(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        name, module = self._owner(self._state())
        q, k, v = (args[i] if len(args) > i else kwargs[x] for i, x in enumerate("qkv"))
        self._on_call(
            AttentionCall(
                site=name,
                module=module,
                q=q,
                k=k,
                v=v,
                mask=None,
                is_causal=False,
                scale=None,
                dropout=0.0,
                output=result[0] if isinstance(result, tuple) else result,
                lse=None,
                kernel=function.attention_kernel,
                tap="function",
                build=lambda: function.pattern_of(*args, **kwargs),
            )
        )
