"""What makes a function an attention kernel of ours: taps can see its calls, and it can tell its own pattern."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

if TYPE_CHECKING:
    from workbench.kernels.patterns import Pattern

FUNCTIONS = ("s2_attention", "lightning_attention", "neighborhood_attention", "scan_attention")
"""Names of the kernels that `attention_function` marks. Sites are found by them in the code of a model."""


def attention_function(pattern: Callable[..., Pattern]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark `f(q, k, v, ...)` as an attention kernel whose pattern is `pattern(q, k, ...)`, with the same options.

    The call goes through PyTorch's own override protocol, so that a function mode sees it as it sees SDPA. Options of
    `f` that `pattern` does not take (such as a tile size) are left out.
    """
    takes = set(inspect.signature(pattern).parameters)

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @wraps(function)
        def call(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            if has_torch_function((q, k, v)):
                return handle_torch_function(call, (q, k, v), q, k, v, *args, **kwargs)
            return function(q, k, v, *args, **kwargs)

        def pattern_of(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Pattern:
            given = signature.bind(q, k, v, *args, **kwargs).arguments
            options = {name: value for name, value in given.items() if name in takes}
            made = pattern(**options)
            made.values = v.detach()
            return made

        call.attention_kernel = function.__name__.removesuffix("_attention")  # type: ignore[attr-defined]
        call.pattern_of = pattern_of  # type: ignore[attr-defined]
        return call

    return mark
