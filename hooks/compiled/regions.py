"""What of a model is compiled: the callables that `torch.compile` made, and where the model's code finds each.

`torch.compile` turns Python into code of its own: module hooks do not run in it, kernels are called under other names
or merged with their surroundings, and what a function mode sees depends on what was compiled before.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

from workbench.errors import CaptureError

EAGER = 'attach(model, compiled="eager"), which runs it uncompiled while something is captured or edited'
"""The way out of what cannot be done in compiled code."""

_DEPTH = 3  # of functions that call functions

Holder = MutableMapping[str, Any] | CellType | None


@dataclass(frozen=True, eq=False)
class Region:
    """One callable that `torch.compile` made.

    Attributes:
        name: path of the module whose code finds it. called: its name there.
        compiled: the callable.
        holder, key: where it stands: a dict and its key, or the cell of a closure. None: inside another function.
        runs: the module that it runs, whose forward it is; None for a function.
        bound: what it is called with first: the module, of methods that a class has compiled.
    """

    name: str
    called: str
    compiled: Callable[..., Any]
    holder: Holder
    key: str
    runs: nn.Module | None
    bound: tuple[nn.Module, ...] = ()
    cls: str = ""

    @property
    def function(self) -> Callable[..., Any]:
        """What was compiled, as it was before."""
        function: Callable[..., Any] = self.compiled._torchdynamo_orig_callable  # type: ignore[attr-defined]
        return function

    @property
    def what(self) -> str:
        """What it is, in a sentence: "the model is compiled"."""
        if self.runs is not None and self.called != "forward":
            return "a module" if self.name else "the model"
        return f"{self.called}(), which {self.cls} runs,"


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` has wrapped; of any other, itself.

    >>> layer = nn.Linear(1, 1)
    >>> uncompiled(layer) is layer
    True
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        inner: nn.Module = model._orig_mod
        return inner
    return model


def stance() -> str:
    """How `torch.compiler.set_stance` has compiled code run in this process."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return "default" if dynamo is None else dynamo._stance.stance


def find_regions(model: nn.Module, *, inside: bool = False) -> list[Region]:
    """What of a model is compiled, in the order of its modules; nothing while the stance is "force_eager".

    Args:
        inside: also what stands inside of what is compiled, where it is compiled together with that.

    >>> find_regions(nn.Linear(1, 1))
    []
    """
    if "torch._dynamo.eval_frame" not in sys.modules or stance() == "force_eager":
        return []
    return list(_Walk(inside).of("", model))


def check_not_compiled(model: nn.Module) -> None:
    """Raise if the model, one of its modules, or a function that one's forward calls by name is compiled.

    Nothing is refused while `torch.compiler.set_stance("force_eager")` holds: then all of it runs as ordinary Python.

    Raises:
        CaptureError: names what is compiled, and the way out.

    >>> check_not_compiled(nn.Linear(1, 1))
    """
    for region in find_regions(model):
        raise CaptureError(
            f"{region.what} is compiled, and cannot be edited there", site=region.name or None, hint=EAGER
        )


def outside(model: nn.Module, regions: list[Region]) -> dict[nn.Module, str]:
    """The modules of a model that no region runs, with their paths."""
    run, found = {region.runs for region in regions}, dict[nn.Module, str]()

    def walk(name: str, module: nn.Module) -> None:
        if module in run or module in found or uncompiled(module) is not module:
            return
        found[module] = name
        for child, one in module.named_children():
            walk(f"{name}.{child}".lstrip("."), one)

    walk("", model)
    return found


class _Walk:
    """Goes through a model's modules, each once; what a class's code mentions is looked up once for the class."""

    def __init__(self, inside: bool) -> None:
        self.inside = inside
        self._seen = set[nn.Module]()
        self._classes = dict[type, tuple[set[str], list[tuple[Any, str, Holder]]]]()

    def of(self, name: str, module: nn.Module) -> Iterator[Region]:
        """What is compiled in a module and below it."""
        if module in self._seen:
            return
        self._seen.add(module)
        own, inner = vars(module), uncompiled(module)
        # Lazy modules have both of the first, of which the second calls the first.
        keys = ("_forward", "forward") if inner is not module else ("_compiled_call_impl",)
        key = next((key for key in keys if _is_compiled(own.get(key))), None)
        if key is not None:
            found = [Region(name, "", own[key], own, key, inner)]
        else:
            found = list(self._functions_of(name, module)) if inner is module else []
        yield from found
        if self.inside or all(region.runs is None for region in found):
            yield from self._children(name, module)

    def _children(self, name: str, module: nn.Module) -> Iterator[Region]:
        for child, one in module.named_children():
            yield from self.of(f"{name}.{child}".lstrip("."), one)

    def _functions_of(self, name: str, module: nn.Module) -> Iterator[Region]:
        """Compiled functions that a module's forward calls: attributes of its own, methods, and by the code's names."""
        cls = type(module)
        if cls not in self._classes:
            names, found = {"forward"}, list[tuple[Any, str, Holder]]()
            forward = inspect.getattr_static(cls, "forward", None)
            for function, called_as, holder in _functions(forward, cls, _DEPTH, self.inside):
                if _is_compiled(function):
                    found.append((function, called_as, holder))
                names |= set(_names(function))
            self._classes[cls] = names, found
        names, found = self._classes[cls]
        own = vars(module)
        for key in sorted(own.keys() & names):
            if _is_compiled(own[key]):
                yield Region(name, key, own[key], own, key, module if key == "forward" else None, (), cls.__name__)
        for function, called, holder in found:
            if called in own and holder is own:
                continue
            if inspect.getattr_static(cls, called, None) is function:  # a method: in the module's dict it is shadowed
                runs = module if called == "forward" else None
                yield Region(name, called, function, own, called, runs, (module,), cls.__name__)
            elif not (_is_compiled(own.get("forward")) and called == "forward"):
                yield Region(name, called, function, holder, called, None, (), cls.__name__)


def _is_compiled(function: Any) -> bool:
    """Whether this is what torch.compile made of a function; torch.compiler.disable leaves a similar mark."""
    marked = getattr(function, "_torchdynamo_orig_callable", None) is not None
    return marked and not getattr(function, "_torchdynamo_disable", False)


def _functions(function: Any, cls: type, depth: int, inside: bool) -> Iterator[tuple[Any, str, Holder]]:
    """A method and what it calls by name, with that name and where it stands: methods of its class, functions of its
    module, closures.

    A decorated function comes as it is, and then what it wraps; a compiled one so if `inside`.
    """
    waiting: list[tuple[Any, str, int, Holder]] = [(function, "forward", depth, None)]
    seen = set[int]()
    while waiting:
        at, name, left, holder = waiting.pop()
        if id(at) in seen or not callable(at):
            continue
        seen.add(id(at))
        yield at, name, holder
        if _is_compiled(at) and not inside:
            continue
        if getattr(at, "__wrapped__", None) is not None:
            waiting.append((at.__wrapped__, name, left, None))
        if left == 0 or not isinstance(at, FunctionType) or _is_compiled(at):
            continue
        cells = dict(zip(at.__code__.co_freevars, at.__closure__ or (), strict=True))
        for called in _names(at):
            known: Any = at.__globals__.get(called, getattr(cls, called, None))
            held: Holder = None
            if called in cells:
                known, held = _content(cells[called]), cells[called]
            elif called in at.__globals__:
                held = at.__globals__
            if _is_compiled(known) or getattr(known, "__module__", None) == at.__module__:
                waiting.append((known, called, left - 1, held))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(function: Any) -> tuple[str, ...]:
    """The names that a function's code mentions, those in functions inside it included."""
    return _names_in(function.__code__) if isinstance(function, FunctionType) else ()


@lru_cache(maxsize=4096)  # asked for at each capture; code never changes
def _names_in(code: CodeType) -> tuple[str, ...]:
    codes, found = [code], dict[str, None]()
    for one in codes:  # grows
        codes.extend(constant for constant in one.co_consts if isinstance(constant, CodeType))
        found |= dict.fromkeys((*one.co_names, *one.co_freevars))
    return tuple(found)
