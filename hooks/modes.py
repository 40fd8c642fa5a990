"""Taking PyTorch's modes off a thread's stacks, whatever has happened to them: safe to repeat, safe when they are gone.

An interrupt can fall between pushing a mode and whatever would pop it. So nothing here trusts that each push has its
pop: the stacks are looked at, and what is not there is not popped.
"""

from __future__ import annotations

import contextlib
import inspect
from types import TracebackType

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

_TORN = {
    contextlib._GeneratorContextManager.__enter__.__code__,
    contextlib._GeneratorContextManager.__exit__.__code__,
}
_FLAGS = {  # of a dispatch mode, and the process-wide flag that it keeps the earlier values of
    "old_dispatch_mode_flags": "_is_in_torch_dispatch_mode",
    "old_non_infra_dispatch_mode_flags": "_is_in_non_infra_torch_dispatch_mode",
    "old_without_ignore_compile_internals_dispatch_mode_flags": "_is_in_any_mode_without_ignore_compile_internals",
}


def leave_function_mode(mode: TorchFunctionMode) -> None:
    """Take a function mode off this thread's stack, as often as it is there; other modes keep their order."""
    while any(each is mode for each in _get_current_function_mode_stack()):
        above = []
        while (top := torch._C._pop_torch_function_stack()) is not mode:
            above.append(top)
        for other in reversed(above):
            torch._C._push_on_torch_function_stack(other)


def leave_dispatch_mode(mode: TorchDispatchMode) -> None:
    """Take a dispatch mode off this thread's stack, with what was pushed above it and never popped."""
    stack = _get_current_dispatch_mode_stack()
    if stack and stack[-1] is mode and len(mode.old_dispatch_mode_flags) == 1:
        mode.__exit__(None, None, None)
        return
    while any(each is mode for each in _get_current_dispatch_mode_stack()):
        torch._C._pop_torch_dispatch_stack(None)
    for name, flag in _FLAGS.items():
        kept = getattr(mode, name, None)
        if kept:
            setattr(_python_dispatch, flag, kept[0])
            kept.clear()


def close_torn(trace: TracebackType | None) -> None:
    """End the context managers that an interrupt has torn while they were entered or left.

    They would end when the traceback is freed, and put back then what has been taken off in between.
    """
    while trace is not None:
        if trace.tb_frame.f_code in _TORN:
            generator = trace.tb_frame.f_locals["self"].gen
            if inspect.getgeneratorstate(generator) == inspect.GEN_SUSPENDED:
                generator.close()
        trace = trace.tb_next
