"""Which modules call attention, read from their code before anything has run."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from workbench.kernels.functions import is_attention_function, mentions_function

# A module that mentions one of these calls an attention kernel; one that mentions a softmax and a product writes
# attention out.
_MARKS = {
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "ALL_ATTENTION_FUNCTIONS",
    "flex_attention",
}
_SOFTMAX = {"softmax", "Softmax"}
_PRODUCTS = {"matmul", "bmm", "einsum"}
_DEPTH = 4  # of functions that call functions

_known: dict[tuple[Any, ...], bool] = {}


def calls_attention(module: nn.Module, *, across_methods: bool = False) -> bool:
    """Whether a module's own forward, or what it calls, mentions an attention kernel or writes attention out.

    Followed are, by the names that the code mentions: methods of the class, also those that it puts in the place of
    another package's, functions of the same package, the functions in a table that one is chosen from, and objects on
    the module that can be called ("processors"). What is a module itself is not followed, since it is looked at on its
    own.

    Args:
        across_methods: take a softmax in one method and a product in another for attention, too.

    >>> calls_attention(nn.Linear(2, 2))
    False
    """
    if isinstance(module, torch.jit.ScriptModule):
        return False  # see `scripted_attention`
    callables = _callables(module)
    softmaxes = frozenset(name for name, part in module.named_children() if isinstance(part, nn.Softmax))
    key = (
        type(module),
        across_methods,
        softmaxes,
        *sorted((name, id(_code(each))) for name, each in callables.items()),
    )
    if key not in _known:
        _known[key] = _Reading(callables, across_methods, softmaxes).finds_attention(type(module))
    return _known[key]


def scripted_attention(model: nn.Module) -> list[str]:
    """Names of the TorchScript parts of a model that call attention, which runs where nothing of Python's sees it."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(not one or name.startswith(f"{one}.") for one in found)
        if isinstance(module, torch.jit.ScriptModule) and not inside and hasattr(module, "graph"):
            text = str(module.inlined_graph)
            if "scaled_dot_product_attention" in text or ("aten::softmax" in text and "matmul" in text):
                found.append(name)
    return found


@dataclass
class _Reading:
    """One search through the code that a module can reach.

    Attributes:
        callables: what the module carries and can be called, by name.
        across_methods: see `calls_attention`.
        softmaxes: names of the modules in it that are a softmax.
    """

    callables: Mapping[str, Any]
    across_methods: bool
    softmaxes: frozenset[str] = frozenset()
    seen: set[CodeType] = field(default_factory=set)
    softmax: bool = False
    product: bool = False

    def finds_attention(self, cls: type[nn.Module]) -> bool:
        own = [_function(self.callables.get("forward")), _function(inspect.getattr_static(cls, "forward", None))]
        return any(self._reaches(function, cls, _DEPTH) for function in own if function is not None)

    def _reaches(self, function: FunctionType, cls: type | None, depth: int) -> bool:
        if function.__code__ in self.seen:
            return False
        self.seen.add(function.__code__)
        codes = [function.__code__]
        for code in codes:  # grows: nested functions are constants of their parent
            codes.extend(c for c in code.co_consts if isinstance(c, CodeType))
        names = {name for code in codes for name in (*code.co_names, *code.co_freevars)}
        names |= self._other_names(function, cls, names)
        softmax = bool(names & (_SOFTMAX | self.softmaxes))
        product = bool(names & _PRODUCTS) or any(map(_multiplies, codes))
        if cls is not None and self.across_methods:
            self.softmax, self.product = softmax, product = self.softmax or softmax, self.product or product
        if names & _MARKS or mentions_function(function, names) or (softmax and product):
            return True
        if cls is not None and any(is_attention_function(self.callables.get(name)) for name in names):
            return True
        if depth == 0:
            return False
        return any(
            self._reaches(called, owner, depth - 1)
            for name in sorted(names)
            for called, owner in self._called(function, cls, name)
        )

    def _other_names(self, function: FunctionType, cls: type | None, names: set[str]) -> set[str]:
        """What functions that are known here by other names are called where they were made (`import … as sdpa`)."""
        closed = _closed_over(function)
        found = set[str | None]()
        for name in names:
            several = [function.__globals__.get(name), closed.get(name)]
            if cls is not None:
                several += [self.callables.get(name), inspect.getattr_static(cls, name, None)]
            found |= {_own_name(each) for each in several if each is not None}
        return {name for name in _MARKS | _SOFTMAX | _PRODUCTS if name in found}

    def _called(
        self, function: FunctionType, cls: type | None, name: str
    ) -> Iterator[tuple[FunctionType, type | None]]:
        """The functions that a name in a function's code may stand for, each with the class whose method it is."""
        if cls is not None:
            inherits = "super" in function.__code__.co_names  # then overridden methods run too
            for base in cls.__mro__ if inherits else (cls,):
                method = _function(vars(base).get(name) if inherits else inspect.getattr_static(base, name, None))
                if method is not None and (_same_package(method, function) or _same_package(method, cls)):
                    yield method, cls
            carried = self.callables.get(name)
            if carried is not None and name != "forward":
                called = _function(carried)
                of_type = _function(inspect.getattr_static(type(carried), "__call__", None))
                if called is not None:
                    yield called, None
                elif of_type is not None:
                    yield of_type, type(carried)
        known = function.__globals__.get(name, _closed_over(function).get(name))
        called = _function(known)
        if called is not None:
            if _same_package(called, function):
                yield called, None
        else:
            for one in _chosen_from(known):
                if _same_package(one, function):
                    yield one, None


def _callables(module: nn.Module) -> dict[str, Any]:
    """What a module carries that can be called and is no module."""
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value) and not isinstance(value, (nn.Module, type, torch.Tensor))
    }


def _code(value: Any) -> Any:
    function = _function(value)
    if function is not None:
        return function.__code__
    return type(value) if _own_name(value) is None else _without_partial(value)


def _own_name(value: Any) -> str | None:
    """The name by which a function was defined, also one that is not Python's; None of what is no function."""
    inner = _without_partial(value)
    name = getattr(inner, "__name__", None) if callable(inner) and not isinstance(inner, type) else None
    return name if isinstance(name, str) else None


def _without_partial(value: Any) -> Any:
    while isinstance(value, (partial, staticmethod)):
        value = value.func if isinstance(value, partial) else value.__func__
    return value


def _function(value: Any) -> FunctionType | None:
    """The function of Python's behind a function, method, property, or decorated or partial one; None for others."""
    for _ in range(10):
        if isinstance(value, FunctionType):
            if not hasattr(value, "__wrapped__"):
                return value
            value = value.__wrapped__
        elif isinstance(value, (staticmethod, classmethod, MethodType)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, partial):
            value = value.__dict__.get("__wrapped__", value.func)
        else:
            value = inspect.getattr_static(value, "__wrapped__", None)  # a cached function
            if not callable(value):
                return None
    return None


def _chosen_from(known: Any) -> Iterator[FunctionType]:
    """The functions of a table: of a dict, or of the dicts of a class."""
    tables = list(vars(known).values()) if isinstance(known, type) else [known]
    for table in tables:
        if isinstance(table, dict):
            yield from (one for one in map(_function, table.values()) if one is not None)


def _closed_over(function: FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return found


def _same_package(one: FunctionType, other: FunctionType | type) -> bool:
    return str(one.__module__).partition(".")[0] == str(other.__module__).partition(".")[0]


def _multiplies(code: CodeType) -> bool:
    """Whether the code uses the operator @."""
    return any(step.opname == "BINARY_OP" and step.argrepr.startswith("@") for step in dis.get_instructions(code))
