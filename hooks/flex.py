"""The tap on `flex_attention` where a model calls it itself.

It does not go through PyTorch's override protocol, and what it compiles inside fails under a function mode. So while
something watches, the name by which the model's own code calls it stands for a function that does: the mode then sees
the call, and is off inside. A call by another way (a closure, an attribute) runs as ever and is not seen.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode_temporarily,
    handle_torch_function,
    has_torch_function,
)

_lock = threading.RLock()
_installed: dict[object, list[dict[str, Any]]] = {}  # by owner: the namespaces that it wants changed
_changed: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # by id: each namespace, and what stood in it

_of_class: WeakKeyDictionary[type, list[dict[str, Any]]] = WeakKeyDictionary()


def _module() -> ModuleType | None:
    return sys.modules.get("torch.nn.attention.flex_attention")


def namespaces(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Where the code of modules finds `flex_attention`: the globals of their classes' methods."""
    flex = _module()
    if flex is None:
        return []
    found = {id(space): space for cls in {type(module) for module in modules} for space in _globals(cls)}
    original = flex.flex_attention
    using = [space for space in found.values() if any(value is original or value is flex for value in space.values())]
    return [*using, vars(flex)] if using else []


def _globals(cls: type) -> list[dict[str, Any]]:
    """The namespaces of a class's methods, PyTorch's own left out."""
    if cls not in _of_class:
        found = {}
        for base in cls.__mro__:
            for value in vars(base).values():
                function = inspect.unwrap(value) if isinstance(value, FunctionType) else None
                if isinstance(function, FunctionType) and (function.__module__ or "").partition(".")[0] != "torch":
                    found[id(function.__globals__)] = function.__globals__
        _of_class[cls] = list(found.values())
    return _of_class[cls]


def install(owner: object, spaces: list[dict[str, Any]]) -> None:
    """From here on calls by these namespaces can be seen; does nothing when repeated."""
    if not spaces:
        return
    with _lock:
        _installed[owner] = spaces
        _settle()


def uninstall(owner: object) -> None:
    """The owner is done; with the last one the names are as they were. Does nothing when repeated."""
    with _lock:
        if _installed.pop(owner, None) is not None:
            _settle()


def _settle() -> None:
    flex = _module()
    if flex is None:
        return
    wanted = {id(space): space for spaces in _installed.values() for space in spaces}
    for key, space in wanted.items():
        if key in _changed:
            continue
        names = {"flex_attention": _seen} if space is vars(flex) else {}
        if space is vars(flex) and hasattr(flex, "setup_compilation_env"):
            names["setup_compilation_env"] = _without_modes(flex.setup_compilation_env)
        original = _original()
        names |= {name: _seen for name, value in space.items() if value is original}
        _changed[key] = space, {name: space[name] for name in names}
        space.update(names)
    for key in [key for key in _changed if key not in wanted]:
        space, before = _changed[key]
        space.update({name: value for name, value in before.items() if name in space})
        del _changed[key]


def _original() -> Callable[..., Any]:
    flex = _module()
    assert flex is not None
    kept = _changed.get(id(vars(flex)))
    function: Callable[..., Any] = flex.flex_attention if kept is None else kept[1]["flex_attention"]
    return function


def _seen(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`flex_attention`, by PyTorch's override protocol."""
    function = _original()
    if not torch.compiler.is_compiling() and has_torch_function((query, key, value)):
        return handle_torch_function(_seen, (query, key, value), query, key, value, *args, **kwargs)
    return function(query, key, value, *args, **kwargs)


def is_flex(function: Any) -> bool:
    """Whether a function is what stands for `flex_attention`."""
    return function is _seen


def arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    bound = inspect.signature(_original()).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _without_modes(original: Callable[..., Any]) -> Callable[..., Any]:
    """The context in which a call is compiled, with the taps of this thread off."""

    @wraps(original)
    @contextmanager
    def entered() -> Iterator[Any]:
        with ExitStack() as off:
            while (stack := _get_current_function_mode_stack()) and _is_tap(stack[-1]):
                off.enter_context(_pop_mode_temporarily())
            with original() as backend:
                yield backend

    return entered


def _is_tap(mode: TorchFunctionMode) -> bool:
    return type(mode).__module__.startswith("workbench.hooks")


def facts(given: dict[str, Any], result: Any, mask: Tensor | None) -> dict[str, Any]:
    """What an `AttentionCall` has of a call by name: queries and keys, or the weights where scores are changed.

    Args:
        given: the arguments. result: what the call gave.
        mask: the block mask as a boolean tensor [batch or 1, head or 1, query, key], or None.
    """
    q, k, v, scale, change = (given[name] for name in ("query", "key", "value", "scale", "score_mod"))
    output, *rest = result if isinstance(result, tuple) else (result,)
    lse = rest[0] if rest and isinstance(rest[0], Tensor) else getattr(rest[0], "lse", None) if rest else None
    known = {"v": v, "output": output, "mask": mask, "scale": scale}
    if change is None:
        return known | {"q": q, "k": k, "lse": None if lse is None else lse.detach()}
    groups = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.repeat_interleave(groups, dim=1).to(wide)
    scores = q.to(wide) @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows = torch.arange(scores.shape[2], device=q.device)[:, None]
    columns = torch.arange(scores.shape[3], device=q.device)[None, :]
    numbers = [torch.arange(n, device=q.device) for n in scores.shape[:2]]
    changed = [
        torch.stack([change(scores[b, h], b, h, rows, columns).expand(scores.shape[2:]) for h in numbers[1]])
        for b in numbers[0]
    ]
    scores = torch.stack(changed)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    # A row that sees no key has weights of zero.
    return known | {"q": None, "k": None, "mask": None, "weights": scores.softmax(-1).nan_to_num(0.0)}
