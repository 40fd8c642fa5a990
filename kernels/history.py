"""Whether patterns keep the autograd history of the tensors that they are made of; usually they do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

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
