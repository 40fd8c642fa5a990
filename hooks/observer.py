"""Observe the attention calls of a model: which module made each, in every thread, with nothing left behind.

PyTorch's process-wide module hooks keep a stack of the running modules. They are used rather than hooks on each module
because modules change their path when they carry hooks, and because a copied or pickled model must carry none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from workbench.errors import InterventionError
from workbench.hooks import bridges, mixers, multihead, registry
from workbench.hooks.kernel_watch import LseWatch
from workbench.hooks.sdpa import FunctionTap
from workbench.hooks.sites import heads_of, kv_heads_of, site_name
from workbench.hooks.tap import AttentionCall
from workbench.hooks.written_out import WrittenOut, ungrouped


@dataclass
class _Frame:
    """One running module, and what its end has to undo.

    Attributes:
        native: it is on a native path of PyTorch's. resumed: a mixer goes on from a cached state.
    """

    name: str
    module: nn.Module
    native: bool = False
    resumed: bool = False
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


@dataclass
class _Thread:
    """What is running in one thread; `replay`: in a backward pass."""

    tap: FunctionTap
    replay: bool = False
    stack: list[_Frame] = field(default_factory=list)


class Observer:
    """A context in which the attention calls inside `model` are reported, and can be edited.

    Args:
        model: the module to watch; calls outside it are ignored.
        on_call: takes each attention call, in the thread that made it. If it gives a tensor, that is what the heads
            give [batch, head, query, width], and the model goes on with it. What it raises leaves through the model's
            forward.
        on_start: called when the outermost module of a forward begins, with that module's name.
        on_end: called when it ends, also by an exception.
        on_inputs: called with the positional and keyword inputs when the model itself is called, or its encoder alone,
            before it runs.
        on_module: called with name, module and positional inputs before each module of the model runs.
        on_output: takes name, module and output of each module when it ends; what it gives, if not None, takes the
            output's place.
        edits: says whether calls may be edited, or their gradients are wanted. PyTorch's own attention modules then
            leave their native path, whose output cannot be had: their numbers change by rounding.
        wants: says whether a state-space mixer is to be reported, which means running its first half again.

    What runs again in a backward pass (gradient checkpointing) starts no forward, and its calls are marked `replay`.
    """

    def __init__(
        self,
        model: nn.Module,
        on_call: Callable[[AttentionCall], Tensor | None],
        on_start: Callable[[str], None] = lambda name: None,
        on_end: Callable[[], None] = lambda: None,
        on_inputs: Callable[[tuple[Any, ...], Mapping[str, Any]], None] = lambda args, kwargs: None,
        on_output: Callable[[str, nn.Module, Any], Any] = lambda name, module, output: None,
        edits: Callable[[], bool] = lambda: False,
        on_module: Callable[[str, nn.Module, tuple[Any, ...]], None] = lambda name, module, args: None,
        wants: Callable[[str], bool] = lambda site: True,
    ) -> None:
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._on_call, self._on_start, self._on_end, self._on_inputs = on_call, on_start, on_end, on_inputs
        self._on_output, self._edits, self._on_module, self._wants = on_output, edits, on_module, wants
        self._threads: dict[int, _Thread] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Observer:
        with contextlib.ExitStack() as stack:
            stack.enter_context(registry.installed())
            stack.enter_context(bridges.called_as_a_whole(self._model, self._is_running))
            handles = [
                torch_module.register_module_forward_pre_hook(self._begin),
                torch_module.register_module_forward_hook(self._finish, with_kwargs=True, always_call=True),
            ]
            for entry in _entries(self._model):
                handles.append(entry.register_forward_pre_hook(_InputsHook(self._inputs), with_kwargs=True))
            for mixer in filter(mixers.is_mixer, self._names):
                handles.append(mixer.register_forward_pre_hook(_InputsHook(self._before_mixer), with_kwargs=True))
            for handle in handles:
                stack.callback(handle.remove)
            # PyTorch's own handle leaves this entry of a module-wide hook behind.
            stack.callback(torch_module._global_forward_hooks_with_kwargs.pop, handles[1].id, None)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        state = self._threads.get(threading.get_ident())
        while state is not None and state.stack:  # an interrupt skips the hooks that would have done this
            self._pop(state)
        self._threads.clear()

    def _state(self) -> _Thread:
        thread = threading.get_ident()
        if thread not in self._threads:
            self._threads[thread] = _Thread(FunctionTap(self._saw_sdpa, self._saw_kernel, self._saw_written_out))
        return self._threads[thread]

    def _is_running(self) -> bool:
        """Whether the model itself is, in this thread."""
        state = self._threads.get(threading.get_ident())
        return state is not None and any(frame.module is self._model for frame in state.stack)

    def _inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        state = self._state()
        if not state.replay and len(state.stack) == 1:
            self._on_inputs(args, kwargs)

    def _begin(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(module)
        if name is None:
            return
        state = self._state()
        frame = _Frame(name, module)
        outermost, native = not state.stack, any(frame.native for frame in state.stack)
        state.stack.append(frame)
        if outermost:
            state.replay = torch._C._current_graph_task_id() != -1
            state.tap.__enter__()
            frame.undo.callback(state.tap.__exit__, None, None, None)
            frame.undo.enter_context(registry.listening(self._run_backend))
            if not state.replay:
                self._on_start(name)
        if isinstance(module, multihead.MODULES) and not native and not self._edits():
            frame.native = True
            state.tap.__exit__(None, None, None)  # they leave their native path under a function mode
            frame.undo.callback(state.tap.__enter__)
            frame.undo.enter_context(multihead.watch(lambda: self._owner(state), self._on_call))
        if not state.replay:
            self._on_module(name, module, args)

    def _finish(self, module: nn.Module, args: Any, *rest: Any) -> Any:
        """`rest` is (keyword inputs, output); after an exception PyTorch leaves out the first."""
        state = self._threads.get(threading.get_ident())
        if state is None or all(frame.module is not module for frame in state.stack):
            return None
        while state.stack[-1].module is not module:
            self._pop(state)
        try:
            if len(rest) != 2 or rest[1] is None:
                return None
            mixed = self._saw_mixer(state, args, *rest) if mixers.is_mixer(module) else None
            output = self._on_output(state.stack[-1].name, module, rest[1] if mixed is None else mixed)
            return mixed if output is None else output
        finally:
            self._pop(state)

    def _pop(self, state: _Thread) -> None:
        state.stack.pop().undo.close()
        if not state.stack and not state.replay:
            self._on_end()

    @staticmethod
    def _owner(state: _Thread) -> tuple[str, nn.Module]:
        return site_name(state.stack[-1].name), state.stack[-1].module

    def _report(self, owner: tuple[str, nn.Module], **facts: Any) -> Tensor | None:
        """The new output of the kernel, or None."""
        call = AttentionCall(site=owner[0], module=owner[1], replay=self._state().replay, **facts)
        with self._state().tap.inside():  # an edit may itself take a softmax and multiply
            z = self._on_call(call)
        return None if z is None else call.as_output(z)

    def _run_backend(
        self, backend: str, function: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A backend of Hugging Face's registry."""
        state = self._state()
        if not state.stack:
            return function(module, *args, **kwargs)
        with state.tap.inside() as inner:
            result = function(module, *args, **kwargs)
        name = self._names.get(module)
        owner = self._owner(state) if name is None else (site_name(name), module)
        facts = registry.read(owner[0], backend, module, args, kwargs, inner)
        replaced = self._report(owner, tap="registry", output=result[0], **facts)
        return result if replaced is None else (replaced, *result[1:])

    def _before_mixer(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Whether it goes on from a cached state can only be told before it runs."""
        state = self._state()
        if state.stack:
            state.stack[-1].resumed = mixers.resumes(module, args, kwargs)

    def _saw_mixer(self, state: _Thread, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """A state-space mixer has run; its new output, or None."""
        name, module = self._owner(state)
        if not self._wants(name):
            return None
        with state.tap.inside(), torch.no_grad():
            call = mixers.mixer_call(name, module, args, kwargs, output, resumed=state.stack[-1].resumed)
            z = self._on_call(replace(call, replay=state.replay))
            edited = None if z is None else call.as_output(z)
        if edited is not None and torch.is_grad_enabled() and output.requires_grad:
            raise InterventionError(
                "gradients do not flow through a state-space mixer whose heads are edited",
                site=name,
                hint="run the model under torch.no_grad(), or edit attention sites",
            )
        return edited

    def _saw_sdpa(self, given: dict[str, Any], output: Tensor, watch: LseWatch) -> Tensor | None:
        return self._report(
            self._owner(self._state()),
            q=given["query"],
            k=given["key"],
            v=given["value"],
            mask=given["attn_mask"],
            is_causal=given["is_causal"],
            scale=given["scale"],
            dropout=given["dropout_p"],
            output=output,
            layout="bhqd" if output.dim() == 4 else "nqd",
            lse=watch.lse,
            kernel=watch.kernel,
            tap="sdpa",
        )

    def _saw_kernel(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Tensor | None:
        q, k, v = (args[i] if len(args) > i else kwargs[x] for i, x in enumerate("qkv"))
        return self._report(
            self._owner(self._state()),
            q=q,
            k=k,
            v=v,
            output=result[0] if isinstance(result, tuple) else result,
            kernel=function.attention_kernel,
            tap="function",
            build=lambda: function.pattern_of(*args, **kwargs),
        )

    def _saw_written_out(self, found: WrittenOut) -> Tensor | None:
        owner = self._owner(self._state())
        weights, values = found.weights, found.values
        if weights.dim() == 3:
            heads = heads_of(owner[1]) or 1
            heads = heads if weights.shape[0] % heads == 0 else 1
            weights, values = (t.unflatten(0, (-1, heads)) for t in (weights, values))
        values = ungrouped(values, kv_heads_of(owner[1]))
        return self._report(
            owner,
            q=None,
            k=None,
            v=values,
            weights=weights,
            output=found.output,
            layout=found.layout,
            dropout=found.dropout,
            kernel="written out",
            tap="written_out",
        )


class _InputsHook:
    """The one hook that a module carries. In a copy of the module, or a pickle, it does nothing."""

    def __init__(self, tell: Callable[..., None] | None = None) -> None:
        self._tell = tell

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._tell is not None:
            self._tell(module, args, kwargs)

    def __reduce__(self) -> tuple[type[_InputsHook], tuple[()]]:
        return _InputsHook, ()


def _entries(model: Any) -> list[nn.Module]:
    """The model, and the encoder that Hugging Face's `generate` calls by itself; none that minds a hook."""
    entries = [model]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        entries.append(model.get_encoder())
    modules = [each for each in dict.fromkeys(entries) if isinstance(each, nn.Module)]
    # PyTorch's own attention modules change their path when they carry a hook.
    return [each for each in modules if not isinstance(each, multihead.MODULES)]
