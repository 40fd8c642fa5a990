"""Refuse models that run as compiled code, in which attention calls cannot be seen.

`torch.compile` turns Python into code of its own: module hooks do not run in it, kernels are called under other names
or merged with their surroundings, and what a function mode sees depends on what was compiled before. A capture would be
empty, have gaps, or change the outputs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from workbench.errors import CaptureError

_EAGER = 'run it under torch.compiler.set_stance("force_eager")'
_DEPTH = 3  # of functions that call functions


def check_not_compiled(model: nn.Module) -> None:
    """Raise if the model, one of its modules, or a function that one's forward calls by name is compiled.

    Nothing is refused while `torch.compiler.set_stance("force_eager")` holds: then all of it runs as ordinary Python.

    Raises:
        CaptureError: names what is compiled, and the way out.

    >>> check_not_compiled(nn.Linear(1, 1))
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None or dynamo._stance.stance == "force_eager":
        return
    functions: dict[type, tuple[set[str], str | None]] = {}
    for name, module in model.named_modules():
        cls = type(module)
        if isinstance(module, dynamo.OptimizedModule):
            way_out = "attach to the uncompiled module, its _orig_mod" if module is model else "put back its _orig_mod"
            raise _compiled("the model" if module is model else "a module", name, f"{way_out}; or {_EAGER}")
        if module._compiled_call_impl is not None:
            raise _compiled("the model" if module is model else "a module", name, f"{_EAGER}, or leave out .compile()")
        if cls not in functions:
            names, found = {"forward"}, None
            for function, called_as in _functions(inspect.getattr_static(cls, "forward", None), cls, _DEPTH):
                found = called_as if _is_compiled(function) and found is None else found
                names |= set(_names(function))
            functions[cls] = names, found
        names, found = functions[cls]
        own = vars(module)
        found = next((each for each in sorted(own.keys() & names) if _is_compiled(own[each])), found)
        if found is not None:
            raise _compiled(f"{found}(), which {cls.__name__} runs,", name, f"{_EAGER}, or call what was compiled")


def _compiled(what: str, name: str, hint: str) -> CaptureError:
    return CaptureError(f"{what} is compiled, and attention cannot be seen in it", site=name or None, hint=hint)


def _is_compiled(function: Any) -> bool:
    """Whether this is what torch.compile made of a function; torch.compiler.disable leaves a similar mark."""
    marked = getattr(function, "_torchdynamo_orig_callable", None) is not None
    return marked and not getattr(function, "_torchdynamo_disable", False)


def _functions(function: Any, cls: type, depth: int) -> Iterator[tuple[Any, str]]:
    """A method and what it calls by name, with that name: methods of its class, functions of its module, closures.

    A compiled or decorated function comes as it is, and then what it wraps.
    """
    waiting, seen = [(function, "forward", depth)], set[int]()
    while waiting:
        at, name, left = waiting.pop()
        if id(at) in seen or not callable(at):
            continue
        seen.add(id(at))
        yield at, name
        if getattr(at, "__wrapped__", None) is not None:
            waiting.append((at.__wrapped__, name, left))
        if left == 0 or not isinstance(at, FunctionType):
            continue
        cells = dict(zip(at.__code__.co_freevars, at.__closure__ or (), strict=True))
        for called in _names(at):
            known = at.__globals__.get(called, getattr(cls, called, None))
            if called in cells:
                known = _content(cells[called])
            if _is_compiled(known) or getattr(known, "__module__", None) == at.__module__:
                waiting.append((known, called, left - 1))


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
