"""What makes a function an attention kernel: taps can see its calls, and it can tell its own pattern.

Recipe for a mechanism of one's own, of which captures, statistics, views and files then know:

    class MyPattern(Pattern):                        # defining it registers the family, so that files load
        def __init__(self, q, k, decay): ...         # check shapes; super().__init__(shape, mask, dtype, device)
        def tile(self, queries, keys, heads=None): ...       # [batch, head, q, k] of A, where out = A·V
        def state(self): return {"decay": self.decay}, {"q": self.q, "k": self.k}
        @classmethod
        def rebuild(cls, facts, tensors): return cls(tensors["q"], tensors["k"], facts["decay"])

    @workbench.attention_function(pattern=MyPattern)  # takes q, k and those options of `attend` that it names
    def attend(q, k, v, decay=0.9): ...               # [batch, head, query, width], or a tuple that begins with it
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from types import CellType, FunctionType, ModuleType
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from workbench.errors import CaptureError
from workbench.kernels.own_packages import import_own_packages
from workbench.kernels.patterns import Pattern

F = TypeVar("F", bound=Callable[..., Any])
FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""The attention functions by name: whatever `attention_function` has marked."""


def attention_function(pattern: Callable[..., Pattern]) -> Callable[[F], F]:
    """Mark `f(q, k, v, ...)` as an attention kernel whose pattern is `pattern(q, k, ...)`, with the same options.

    The call goes through PyTorch's own override protocol, so that a function mode sees it as it sees SDPA. Options of
    `f` that `pattern` does not take (such as a tile size) are left out.

    Args:
        pattern: makes the map A of a call, out = A·V; its parameters are called as those of `f`.

    Raises:
        CaptureError: the first parameters of `f` are not q, k and v, or `pattern` needs one that `f` does not have.

    >>> import torch
    >>> from workbench.kernels.patterns import DensePattern
    >>> @attention_function(pattern=lambda q, k: DensePattern((q @ k.mT).softmax(-1)))
    ... def unscaled_attention(q, k, v):
    ...     return (q @ k.mT).softmax(-1) @ v
    >>> unscaled_attention(*torch.zeros(3, 1, 1, 2, 4)).shape
    torch.Size([1, 1, 2, 4])
    """
    takes = inspect.signature(pattern).parameters

    def mark(function: F) -> F:
        signature = inspect.signature(function)
        _check(function.__name__, list(signature.parameters), takes)

        @wraps(function)
        def call(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            if has_torch_function((q, k, v)):
                return handle_torch_function(call, (q, k, v), q, k, v, *args, **kwargs)
            return function(q, k, v, *args, **kwargs)

        def pattern_of(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Pattern:
            given = signature.bind(q, k, v, *args, **kwargs).arguments
            made = pattern(**{name: value for name, value in given.items() if name in takes})
            if not isinstance(made, Pattern):
                raise CaptureError(f"the pattern of {function.__name__} is a {type(made).__name__}, no Pattern")
            made.values = v.detach()
            return made

        call.attention_kernel = function.__name__.removesuffix("_attention")  # type: ignore[attr-defined]
        call.pattern_of = pattern_of  # type: ignore[attr-defined]
        FUNCTIONS[function.__name__] = call
        return call  # type: ignore[return-value]

    return mark


def _check(name: str, parameters: list[str], takes: Mapping[str, inspect.Parameter]) -> None:
    if parameters[:3] != ["q", "k", "v"]:
        raise CaptureError(
            f"{name} begins with the parameters {', '.join(parameters[:3]) or 'none'}", hint="call them q, k and v"
        )
    needed = [each.name for each in takes.values() if each.default is each.empty and each.kind < each.VAR_POSITIONAL]
    missing = [each for each in needed if each not in parameters]
    if missing:
        raise CaptureError(f"the pattern of {name} needs {missing[0]}, which {name} does not take")


def mentions_function(code: FunctionType, names: Iterable[str]) -> bool:
    """Whether a function that uses these names mentions an attention function, by its name or under another one.

    A name that is no variable is one where a module that the function knows has an attention function of that name: an
    attribute of an object may be called so too.
    """
    import_own_packages()
    cells = zip(code.__code__.co_freevars, code.__closure__ or (), strict=False)
    known = code.__globals__ | {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    names = set(names)
    if any(is_attention_function(known.get(name)) for name in names):
        return True
    own = names & FUNCTIONS.keys()
    if not own:
        return False  # soon, since attaching asks this of every module
    modules = [thing for name in names if isinstance(thing := known.get(name, sys.modules.get(name)), ModuleType)]
    for module in modules:  # grows: modules inside of modules
        inside = [sys.modules.get(f"{module.__name__}.{name}") for name in names]
        modules += [each for each in inside if each is not None and each not in modules]
    return any(is_attention_function(getattr(module, name, None)) for module in modules for name in own)


def is_attention_function(thing: Any) -> bool:
    """Whether `attention_function` has marked it."""
    return isinstance(thing, FunctionType) and hasattr(thing, "attention_kernel")


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
