"""The tap on functions: SDPA wherever a model calls it, our own kernels, and attention that a model writes out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from workbench.hooks.flex import is_flex
from workbench.hooks.kernel_watch import LseWatch, as_multiplied
from workbench.hooks.linear import LINEAR_FUNCTIONS
from workbench.hooks.written_out import Follower, WrittenOut

OnSdpa = Callable[[dict[str, Any], Tensor, LseWatch], Tensor | None]
OnKernel = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], Tensor | None]
OnLinear = Callable[[Any, Sequence[Any]], Tensor | None]

_SDPA = torch.nn.functional.scaled_dot_product_attention
_COMPOSITE = torch.nn.functional.multi_head_attention_forward
# The same code, which does not ask for modes at its start: with it the mode can be on inside.
_COMPOSITE_CODE = FunctionType(
    _COMPOSITE.__code__,
    {**_COMPOSITE.__globals__, "has_torch_function": lambda tensors: False},
    _COMPOSITE.__name__,
    _COMPOSITE.__defaults__,
)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """SDPA's parameters, to bind a call's arguments by name; the builtin has no signature of its own."""


SIGNATURE = inspect.signature(_sdpa)
_TENSORS = ("query", "key", "value", "attn_mask")


class FunctionTap(TorchFunctionMode):
    """While entered in a thread, reports each attention call of that thread.

    Args:
        on_sdpa: takes an SDPA call's arguments, output, and what was seen of its kernel.
        on_kernel: takes a kernel of ours (see `workbench.kernels.functions`), its arguments and its result.
        on_written_out: takes an attention that the model wrote out.
        on_linear: takes a function that may be a projection, and its arguments, before it runs; gives what it is
            applied to, if its result is wanted too. on_made: takes both.

    The first three give what takes the place of the output, or None. The call itself runs as the model made it.

    Attributes:
        shut: it reports nothing any more, wherever it may still be entered.
    """

    def __init__(
        self,
        on_sdpa: OnSdpa,
        on_kernel: OnKernel,
        on_written_out: Callable[[WrittenOut], Tensor | None],
        on_linear: OnLinear,
        on_made: Callable[[Tensor, Tensor], None],
    ) -> None:
        super().__init__()
        self._on_sdpa, self._on_kernel, self._on_linear, self._on_made = on_sdpa, on_kernel, on_linear, on_made
        self._follower = Follower(on_written_out)
        self._inner: LseWatch | None = None
        self.shut = False

    @property
    def entered(self) -> bool:
        """Whether it is on this thread's stack of modes."""
        return any(mode is self for mode in _get_current_function_mode_stack())

    @contextmanager
    def inside(self) -> Iterator[LseWatch]:
        """Calls inside belong to a backend that is reported as a whole; what is seen of SDPA's kernel is given."""
        outer, self._inner = self._inner, LseWatch()
        try:
            yield self._inner
        finally:
            self._inner = outer

    @contextmanager
    def away(self) -> Iterator[LseWatch]:
        """As `inside`, where SDPA is not called: off the stack, if on top of it, so that each function costs less."""
        stack = _get_current_function_mode_stack()
        if not stack or stack[-1] is not self:
            with self.inside() as inner:
                yield inner
            return
        try:
            torch._C._pop_torch_function_stack()
            yield LseWatch()
        finally:
            if not self.entered and not self.shut:
                torch._C._push_on_torch_function_stack(self)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.shut or torch.compiler.is_compiling():  # what a function compiles by itself is not looked into
            return func(*args, **kwargs)
        if func is _SDPA:
            return self._sdpa(func, args, kwargs)
        if func is _COMPOSITE:
            with self:  # a handler runs outside its own mode, and what we look for is inside this function
                return _COMPOSITE_CODE(*args, **kwargs)
        if func in LINEAR_FUNCTIONS and self._inner is None:
            given = self._on_linear(func, args)
            result = func(*args, **kwargs)
            if given is not None and isinstance(result, Tensor):
                self._on_made(given, result)
        else:
            result = func(*args, **kwargs)
        if self._inner is not None:
            return result
        if hasattr(func, "attention_kernel") or is_flex(func):
            replaced = self._on_kernel(func, args, kwargs, result)
            if replaced is None:
                return result
            return (replaced, *result[1:]) if isinstance(result, tuple) else replaced
        given = self._follower.saw(func, args, kwargs, result)
        if given is not result and isinstance(out := kwargs.get("out"), Tensor):
            return out.copy_(given)  # where the model reads it
        return given

    def _sdpa(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        bound = SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        watch = self._inner or LseWatch()
        q = bound.arguments["query"]
        watched = not q.is_nested  # whose kernels cannot be
        output = watch.run(func, args, kwargs, q.shape[-2]) if watched else func(*args, **kwargs)
        if self._inner is not None:
            return output
        given = bound.arguments
        taken = {name: as_multiplied(given[name]) for name in _TENSORS if given[name] is not None}
        replaced = self._on_sdpa(given | taken, output, watch)
        return output if replaced is None else replaced
