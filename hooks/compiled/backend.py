"""Compiling once more, with the operator in: the same compiler, the same options, and a graph that records.

What is compiled so has an entry of its own in Dynamo's cache, which is chosen by the compiler that is asked for. So the
model's own entries stay as they are, and a graph is compiled once for all captures of the process.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import fx

from workbench.errors import CaptureError
from workbench.hooks.compiled import graph
from workbench.hooks.compiled.operator import ATTENTION, KERNEL, LSE, OUT, K, Q, V
from workbench.hooks.compiled.regions import EAGER, Region
from workbench.hooks.kernel_watch import kernel_name

_PASS = "post_grad_custom_pre_pass"
_lock = threading.Lock()
_backends: list[Recording] = []  # they outlive captures: Dynamo's cache tells them apart by identity
_contexts: dict[tuple[int, bool, bool | None], Any] = {}


class Recording:
    """A backend that puts the operator behind each attention, and then compiles as `inner` does."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        given = getattr(inner, "__call__", inner)  # noqa: B004 - its signature, not whether it can be called
        self._takes_passes = getattr(inner, "compiler_name", "") == "inductor" and (
            "config_patches" in inspect.signature(given).parameters
        )

    def __call__(self, module: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        if graph.insert(module) and self._takes_passes:
            options["config_patches"] = {_PASS: _kernel_pass()(_own_pass(self.inner))}
        return self.inner(module, inputs, **options)


def recording(region: Region) -> Callable[..., Any]:
    """What runs as the region does and records its attention. It is compiled at its first call, and then not again.

    Raises:
        CaptureError: how it was compiled cannot be told.
    """
    try:
        context = inspect.getclosurevars(region.compiled).nonlocals["self"]
        inner = torch._dynamo.eval_frame.innermost_backend(context.callback)
    except (TypeError, KeyError, AttributeError, AssertionError) as error:
        raise CaptureError(
            f"{region.what} was compiled in a way that cannot be repeated",
            site=region.name or None,
            hint=f"use {EAGER}",
        ) from error
    if getattr(inner, "compiler_name", "") == "cudagraphs":
        raise CaptureError(
            f"{region.what} is compiled into CUDA graphs, which are replayed without a word of what they compute",
            site=region.name or None,
            hint=f'use {EAGER}; mode="reduce-overhead" makes CUDA graphs of what may be recorded',
        )
    full = bool(getattr(context, "fullgraph", False))
    dynamic: bool | None = getattr(context, "_dynamic", None)
    with _lock:
        backend = next((one for one in _backends if one.inner is inner or one.inner == inner), None)
        if backend is None:
            _backends.append(backend := Recording(inner))
        key = id(backend), full, dynamic
        if key not in _contexts:
            _contexts[key] = torch._dynamo.optimize(backend=backend, nopython=full, dynamic=dynamic, **_apart())
        made: Callable[..., Any] = _contexts[key](region.function)
    return made


def _apart() -> dict[str, Any]:
    """What keeps the entries from counting among the model's own, which are limited, where this PyTorch has it."""
    known = inspect.signature(torch._dynamo.optimize).parameters
    # Regions that are alike share their code: as many entries as a large model has kinds of layers and lengths.
    wanted = {"isolate_recompiles": True, "recompile_limit": 64}
    return {name: value for name, value in wanted.items() if name in known}


def _own_pass(inner: Any) -> Any:
    """The pass that the model's owner has asked for at the same place."""
    config: Mapping[str, Any] = getattr(inner, "config", {})
    return config.get(_PASS) or getattr(torch._inductor.config, _PASS, None)


@cache
def _kernel_pass() -> type:
    """The class of the pass, made when inductor is there: importing that takes seconds."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class KernelPass(CustomGraphPass):
        """Hands the operator what the fused kernel takes and gives: its log-sum-exp, which it has computed anyway."""

        def __init__(self, before: Any) -> None:
            self.before = before

        def __call__(self, given: fx.Graph) -> None:
            if self.before is not None:
                self.before(given)
            for node in given.find_nodes(op="call_function", target=ATTENTION):
                _from_kernel(given, node)

        def uuid(self) -> Any:
            own = get_hash_for_files((__file__,))
            if self.before is None:
                return own
            theirs = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
            return None if theirs is None else (own, theirs)

    return KernelPass


def _from_kernel(given: fx.Graph, node: fx.Node) -> None:
    out: Any = node.args[OUT]
    while out.op == "call_function" and out.target in _VIEWS:
        out = out.args[0]
    fused: Any = out.args[0] if out.args and getattr(out.target, "__name__", "") == "getitem" else None
    name = kernel_name(fused.target) if isinstance(getattr(fused, "target", None), torch._ops.OpOverload) else None
    if fused is None or name is None:
        return
    made = fused.meta["val"][1]
    with given.inserting_after(fused):
        lse = given.call_function(out.target, (fused, 1))
    lse.meta["val"] = made
    node.update_arg(LSE, lse)
    node.update_arg(KERNEL, name)
    for place, taken in zip((Q, K, V), fused.args[:3], strict=True):
        asked: Any = node.args[place]  # under autocast not yet in the dtype in which it is multiplied
        if asked is not None and taken.meta["val"].shape == asked.meta["val"].shape:
            node.update_arg(place, taken)


_VIEWS = {torch.ops.aten.slice.Tensor, torch.ops.aten.view.default}
