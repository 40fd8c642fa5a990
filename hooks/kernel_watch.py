"""Watch which attention kernel really runs, below autograd, and pick up the log-sum-exp that it computes anyway.

The watch only looks: the operator runs with the arguments it was given, so the model's bits cannot change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from workbench.hooks.modes import leave_dispatch_mode

OnOperator = Callable[[OpOverload, Sequence[Any], Mapping[str, Any], Any], None]
_AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}  # what autocast casts; double stays
_AUTOCAST_KEYS = (("cpu", torch._C.DispatchKey.AutocastCPU), ("cuda", torch._C.DispatchKey.AutocastCUDA))
_PREFIX = "_scaled_dot_product_"


class KernelWatch(TorchDispatchMode):
    """While entered, calls `on_operator(op, args, kwargs, result)` after every operator.

    Args:
        whole: operators that call others themselves, and are called by the model: they run as they were called, under
            the autocast that there is.
    """

    def __init__(self, on_operator: OnOperator, whole: Collection[OpOverload] = ()) -> None:
        super().__init__()
        self._on_operator, self._whole = on_operator, whole
        self._autocast = [key for kind, key in _AUTOCAST_KEYS if torch.is_autocast_enabled(kind)]

    @property
    def entered(self) -> bool:
        """Whether it is on this thread's stack of modes."""
        return any(mode is self for mode in _get_current_dispatch_mode_stack())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with _above_views(), self:  # under inference_mode composites arrive here whole; we look for their parts
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        with _under_autocast(self._autocast if func in self._whole else ()):
            result = func(*args, **kwargs)
            self._on_operator(func, args, kwargs, result)
        return result


@contextmanager
def _under_autocast(keys: Sequence[torch._C.DispatchKey]) -> Iterator[None]:
    """Autocast of these kinds is on again, which is off below."""
    if not keys:
        yield
        return
    with torch._C._PreserveDispatchKeyGuard():
        for key in keys:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


@contextmanager
def _above_views() -> Iterator[None]:
    """What runs inside handles views as where the operator was called, above this watch.

    There a view of a parameter needs a gradient, in inference mode too, and the product of a batch with such a view is
    made by another kernel, with another rounding.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch._C._PreserveDispatchKeyGuard():
        torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.ADInplaceOrView, False)
        yield


def kernel_name(op: OpOverload) -> str | None:
    """Short name of a fused attention kernel, such as "flash_attention_for_cpu"; None for any other operator."""
    name = op._schema.name.removeprefix("aten::")
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else None


def kernel_lse(result: Any, n_queries: int) -> Tensor | None:
    """[batch, head, query] log-sum-exp (natural log) out of a fused kernel's result; None if it gave none.

    Some kernels pad the query axis, add a trailing axis of one, or return an empty tensor when no gradient is needed.
    """
    if not isinstance(result, tuple) or len(result) < 2 or not isinstance(result[1], Tensor):
        return None
    lse = result[1]
    if lse.dim() == 4 and lse.shape[-1] == 1:
        lse = lse.squeeze(-1)
    if lse.dim() != 3 or lse.shape[-1] < n_queries or lse.numel() == 0 or not lse.is_floating_point():
        return None
    return lse[..., :n_queries]


def as_multiplied(tensor: Tensor) -> Tensor:
    """A tensor in the dtype in which matrix products take it here: under autocast not the one that it has."""
    kind = tensor.device.type
    if tensor.dtype in _AUTOCAST and torch.is_autocast_enabled(kind):
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


class LseWatch:
    """Runs one SDPA call and tells which kernel ran and what log-sum-exp it gave; `called` says whether one ran."""

    def __init__(self) -> None:
        self.kernel = "math"  # SDPA's composite path has no operator of its own
        self.lse: Tensor | None = None
        self.called = False

    def run(
        self, function: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any], n_queries: int
    ) -> Tensor:
        """The function's own result."""
        self.called = True

        def look(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
            name = kernel_name(op)
            if name is not None:
                self.kernel, self.lse = name, kernel_lse(result, n_queries)

        watch = KernelWatch(look)
        try:
            watch.__enter__()
            return function(*args, **kwargs)
        finally:
            try:
                leave_dispatch_mode(watch)
            finally:
                leave_dispatch_mode(watch)  # again, for the interrupt that broke off the first


SOFTMAX_OPERATORS = {torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default}
"""Operators by which an attention that is written out in matrix products computes its weights."""
