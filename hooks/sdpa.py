"""The tap on attention functions: SDPA, wherever a model calls it, and the kernels of `workbench.kernels`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from workbench.hooks.kernel_watch import LseWatch

OnSdpa = Callable[[dict[str, Any], Tensor, LseWatch], None]
OnKernel = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None]

_SDPA = torch.nn.functional.scaled_dot_product_attention


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


_SIGNATURE = inspect.signature(_sdpa)


class FunctionTap(TorchFunctionMode):
    """While entered in a thread, reports each attention call of that thread.

    Args:
        on_sdpa: takes an SDPA call's arguments, output, and what was seen of its kernel.
        on_kernel: takes a kernel of ours (see `workbench.kernels.functions`), its arguments and its result.

    The call itself runs as the model made it. Calls inside composite functions such as
    `F.multi_head_attention_forward` are not seen here: `multihead.py` sees to them.
    """

    def __init__(self, on_sdpa: OnSdpa, on_kernel: OnKernel) -> None:
        super().__init__()
        self._on_sdpa, self._on_kernel = on_sdpa, on_kernel

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _SDPA:
            result = func(*args, **kwargs)
            if hasattr(func, "attention_kernel"):
                self._on_kernel(func, args, kwargs, result)
            return result
        bound = _SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        watch = LseWatch()
        output = watch.run(func, args, kwargs, bound.arguments["query"].shape[-2])
        self._on_sdpa(bound.arguments, output, watch)
        return output
