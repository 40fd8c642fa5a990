"""Runs single modules of a model again on what they were given, with changed inputs, or with parts of them held fixed.

One forward is recorded module by module. In a replay the kernels of attention may give what they gave then, and so may
modules inside; both run all the same, so that random numbers fall as before. Nothing stays on the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks.changes import Changes
from workbench.hooks.nested import tensors_within
from workbench.hooks.tap import AttentionCall

OnCall = Callable[[AttentionCall], Tensor | None]
Observe = Callable[[OnCall], AbstractContextManager[Any]]
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, nn.Module, type)


@dataclass(eq=False)
class ModuleCall:
    """One call of a module, as it was recorded.

    Attributes:
        args, kwargs, output: copies. rng: the state of the generators before it. autocast: that of each kind of device.
        outer, inner: the call around it, and those in it.
        reads: numbers of the kernel calls inside, the first and the one after the last.
        read_whole: it is read as a whole, by its inputs and parameters (a state-space mixer, say).
        features: 1 or −1, the axis of features, by what its first module with parameters is; None: not known.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rng: list[Tensor]
    outer: ModuleCall | None
    output: Any = None
    inner: list[ModuleCall] = field(default_factory=list)
    reads: tuple[int, int] = (0, 0)
    read_whole: bool = False
    features: int | None = None
    autocast: list[tuple[str, torch.dtype, bool]] = field(default_factory=list)


_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def _features_axis(module: nn.Module, shape: Sequence[int] | None) -> int | None:
    """The axis of features in what a leaf is given: 1 or −1; None where it does not tell.

    A norm over the channels of an image has as many weights as there are channels.
    """
    if isinstance(module, _CHANNELS_FIRST):
        return 1
    sizes = [p.numel() if p.numel() == max(p.shape, default=1) else 0 for p in module.parameters()]
    if not sizes:
        return None
    if shape is None or len(shape) < 4 or isinstance(module, nn.Linear) or shape[1] not in sizes:
        return -1
    return None if shape[-1] in sizes else 1


class Replays:
    """A recorded forward. A context: replays are possible inside.

    Args:
        model: the module. args, kwargs: its inputs; they are not changed.
        observe: makes a context in which a function is given each attention call of the model, and may give what its
            heads give instead.
        limit: most bytes that the copies may take.

    Attributes:
        calls: of the modules, each after those inside it; the last is the model's own.
        batch: how many examples there are.

    Raises:
        CaptureError: the limit is exceeded.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], observe: Observe, limit: int
    ) -> None:
        self.model, self._given, self._observe = model, (args, kwargs), observe
        self.calls: list[ModuleCall] = []
        self.batch = next((t.shape[0] for t in tensors([args, kwargs]) if t.dim()), 1)
        self._limit, self._kept, self._bytes = limit, {}, 0  # type: ignore[var-annotated]
        self._names = {module: name for name, module in model.named_modules()}
        self._stack: list[ModuleCall] = []
        self._outputs: list[Tensor] = []  # of the kernels
        self._next: Iterator[Tensor] | None = None
        self._changed = False
        self._frozen: dict[nn.Module, list[Any]] = {}
        self._recording = False
        self._seen: list[AttentionCall] | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Replays:
        with contextlib.ExitStack() as stack:
            devices = sorted({p.device.index for p in self.model.parameters() if p.is_cuda})
            stack.enter_context(torch.random.fork_rng(devices))
            self._devices = devices
            stack.enter_context(torch.no_grad())
            changes = stack.enter_context(Changes())
            for module in self._names:
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # it takes no hooks; what it mixes shows in what holds it
                changes.before(module, self._begin, with_kwargs=True)
                changes.after(module, self._end, with_kwargs=True)
            stack.enter_context(self._observe(self._on_call))
            self._recording = True
            args, kwargs = copied(self._given)
            self.model(*args, **kwargs)
            self._recording = False
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def run(
        self,
        call: ModuleCall,
        inputs: Any = None,
        *,
        frozen: Sequence[ModuleCall] | None = None,
        changed: bool = False,
    ) -> Any:
        """What a module gives when it is called again.

        Args:
            inputs: (args, kwargs) in place of those it had.
            frozen: all kernels inside give what they gave, and so do these calls; None: nothing is held fixed.
            changed: each of these kernels gives something else at one query of one example.
        """
        args, kwargs = copied((call.args, call.kwargs) if inputs is None else inputs)
        self._next = None if frozen is None else iter(self._outputs[slice(*call.reads)])
        self._changed, self._frozen = changed, {}
        for one in frozen or ():
            self._frozen.setdefault(one.module, []).append(one.output)
        torch.set_rng_state(call.rng[0])
        for device, state in zip(self._devices, call.rng[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        try:
            with contextlib.ExitStack() as stack:
                for kind, dtype, enabled in call.autocast:  # which a module around it may have changed
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
                # A class may change what its modules are called with in its `__call__`: hooks have seen the rest.
                return nn.Module.__call__(call.module, *args, **kwargs)
        finally:
            self._next, self._changed, self._frozen = None, False, {}

    @contextmanager
    def watched(self) -> Iterator[list[AttentionCall]]:
        """The attention calls of the replays inside."""
        self._seen = []
        try:
            yield self._seen
        finally:
            self._seen = None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self._recording:
            return
        rng = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]
        outer = self._stack[-1] if self._stack else None
        call = ModuleCall(self._names[module], module, self._keep(args), self._keep(dict(kwargs)), rng, outer)
        call.reads = len(self._outputs), len(self._outputs)
        kinds = ("cpu", "cuda") if self._devices else ("cpu",)
        call.autocast = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in kinds]
        if outer is not None:
            outer.inner.append(call)
        self._stack.append(call)
        if not any(True for _ in module.children()):
            self._learn_features(module, call)

    def _learn_features(self, module: nn.Module, leaf: ModuleCall) -> None:
        """A leaf with parameters says where features are, for all around it that were given the same shape."""
        shape = next((t.shape for t in tensors([leaf.args, leaf.kwargs]) if t.is_floating_point()), None)
        axis = _features_axis(module, shape)
        if axis is None:
            return
        for call in self._stack:
            given = next((t.shape for t in tensors([call.args, call.kwargs])), None)
            if call.features is None and shape == given:
                call.features = axis

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._recording:
            held = self._frozen.get(module)
            return copied(held.pop(0)) if held else None
        call = self._stack.pop()
        call.output, call.reads = self._keep(output), (call.reads[0], len(self._outputs))
        self.calls.append(call)
        return None

    def _on_call(self, call: AttentionCall) -> Tensor | None:
        if self._seen is not None:
            self._seen.append(call)
        whole = call.finish is not None
        if self._recording:
            inside = next((c for c in reversed(self._stack) if c.module is call.module), None)
            if whole and inside is not None:
                inside.read_whole = True
            if not whole:
                self._outputs.append(self._keep(call.z()))
            return None
        if self._next is None or whole:
            return None
        held = next(self._next, None)
        if held is None or held.shape != call.z().shape:
            return None
        held = held.clone()
        if self._changed:
            over_features = call.axes is not None and call.axes.axes.over == "features"  # its width are positions
            of_query = held.transpose(2, 3) if over_features else held
            row, noise = of_query[held.shape[0] // 2, :, of_query.shape[2] // 2], torch.Generator().manual_seed(0)
            spread = spread_of(held)
            row += (torch.randn(row.shape, generator=noise).to(row.device) * spread).to(row.dtype)
        return held

    def _keep(self, x: Any) -> Any:
        """A copy; of one tensor only one, however often modules hand it on."""

        def keep(t: Tensor) -> Tensor:
            key = (t.data_ptr(), -1 if t.is_inference() else t._version, t.shape, t.stride(), t.dtype)
            if t.is_inference() or key not in self._kept:
                self._bytes += t.numel() * t.element_size()
                if self._bytes > self._limit:
                    raise CaptureError(
                        f"looking at every module would keep more than {self._limit:,} bytes",
                        hint="look at a shorter input, or at fewer examples",
                    )
                self._kept[key] = t, t.detach().clone()  # the tensor itself too, so that its address stays its own
            return self._kept[key][1]

        return mapped(keep, x)


def spread_of(t: Tensor) -> Tensor:
    """How large a change of numbers like these is: their spread; of numbers that are all alike, their size, or one.

    >>> spread_of(torch.tensor([3.0, 3.0])).item(), spread_of(torch.zeros(2)).item()
    (3.0, 1.0)
    """
    t = t.float().nan_to_num(posinf=0, neginf=0) if t.numel() else t.new_zeros(1, dtype=torch.float32)
    spread, size = t.std(correction=0), t.abs().amax()
    return torch.where(spread > 1e-4 * size, spread, torch.where(size > 0, size, 1.0))


def tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and the like, in order."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from tensors(value)
    elif isinstance(x, (tuple, list)):
        for value in x:
            yield from tensors(value)


def mapped(f: Callable[[Tensor], Tensor], x: Any) -> Any:
    """The same nesting with `f` of each tensor; other objects, such as caches, are copied as a whole."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, _PLAIN):
        return x
    if isinstance(x, tuple):
        parts = [mapped(f, value) for value in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if type(x) is list:
        return [mapped(f, value) for value in x]
    if type(x) is dict:
        return {key: mapped(f, value) for key, value in x.items()}
    if isinstance(x, Mapping) and hasattr(x, "__setitem__"):
        made: Any = copy.copy(x)
        for key, value in x.items():
            made[key] = mapped(f, value)
        return made
    if callable(x):
        return x
    with torch.inference_mode(False):  # tensors first: a deep copy refuses those that are part of a graph
        return copy.deepcopy(x, {id(t): t.detach().clone() for t in tensors_within(x)})


def copied(x: Any) -> Any:
    """A copy that a module may write to."""
    return mapped(lambda t: t.detach().clone(), x)
