"""Whether autograd's history is kept: patterns usually do not keep that of the tensors that they are made of.

What forgets it where gradients would be expected says so when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError

_KEPT: ContextVar[bool] = ContextVar("kept", default=False)


@contextmanager
def differentiable() -> Iterator[None]:
    """Patterns that are made inside let gradients reach what they are made of, where they do not say otherwise.

    >>> import torch
    >>> from workbench.kernels.recurrent import RecurrentPattern
    >>> one = torch.ones(1, 1, 2, 1, requires_grad=True)
    >>> RecurrentPattern(one, one).apply(one).requires_grad
    True
    >>> with differentiable():
    ...     pattern = RecurrentPattern(one, one)
    >>> pattern.dense().requires_grad, RecurrentPattern(one, one).dense().requires_grad
    (True, False)
    """
    token = _KEPT.set(True)
    try:
        yield
    finally:
        _KEPT.reset(token)


def own(tensor: Tensor) -> Tensor:
    """The tensor as a pattern holds it: without its history, except in `differentiable`."""
    return tensor if _KEPT.get() else tensor.detach()


def learns(*tensors: Tensor) -> bool:
    """Whether gradients would be expected to reach one of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def without_gradients(found: Tensor, why: str, hint: str) -> Tensor:
    """The same numbers, of which `backward` is a CaptureError that says why there are no gradients.

    >>> without_gradients(torch.ones(2), "a cache forgets", "use the whole sequence").sum().backward()
    Traceback (most recent call last):
    workbench.errors.CaptureError: a cache forgets
    Hint: use the whole sequence
    """
    if not torch.is_grad_enabled():
        return found
    anything = torch.empty(0, device=found.device, requires_grad=True)
    out: Tensor = _NoWayBack.apply(anything, [found.detach()], why, hint)
    return out


class _NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anything: Tensor, found: list[Tensor], why: str, hint: str) -> Tensor:
        ctx.said = why, hint
        return found[0]

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[None, ...]:
        why, hint = ctx.said
        raise CaptureError(why, hint=hint)
