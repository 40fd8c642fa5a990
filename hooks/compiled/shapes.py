"""Nodes of Dynamo's graph as tensors without content, and as the functions that they call."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

_OPERATORS: dict[Any, Any] = {
    operator.getitem: Tensor.__getitem__, operator.matmul: Tensor.__matmul__, operator.mul: Tensor.mul,
    operator.imul: Tensor.mul_,
}  # fmt: skip


def wanted_function(node: fx.Node) -> Callable[..., Any] | None:
    """What a node calls, as Python code would: a function or a method of tensors; None for anything else."""
    if node.op == "call_function" and callable(node.target):
        function: Callable[..., Any] = _OPERATORS.get(node.target, node.target)
        return function
    return getattr(Tensor, str(node.target), None) if node.op == "call_method" else None


def size(given: Any) -> int | float | bool | None:
    """A number; of one that changes from call to call, what it was when the graph was compiled; None if not known."""
    if isinstance(given, (bool, int, float)):
        return given
    hint = getattr(getattr(given, "node", None), "hint", None)
    return hint if isinstance(hint, (bool, int, float)) else None


def like(node: fx.Node) -> Any:
    """A tensor without content in the shape of what a node gives, or the number that it gives; None if not known."""
    given = node.meta.get("example_value")
    if not isinstance(given, Tensor):
        return size(given)
    shape = [size(n) for n in given.shape]
    if any(n is None for n in shape):
        return None
    return torch.empty([int(n) for n in shape if n is not None], dtype=given.dtype, device="meta")


def resolved(given: Any, value: Callable[[fx.Node], Any]) -> Any:
    """Arguments of a node with values in the place of nodes."""
    return fx.map_arg(given, value)
