"""What a compiled graph does with what heads give, until a linear function takes it: that shows what its axes are.

The nodes between are run once on numbers that count the elements, so that where each element goes is seen, whatever
they are called. It takes the place of comparing values while the model runs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from workbench.errors import WorkbenchError
from workbench.hooks.compiled.shapes import like, resolved, wanted_function
from workbench.hooks.linear import LINEAR_FUNCTIONS, projected
from workbench.hooks.proofs.axes import Axes
from workbench.hooks.proofs.by_value import prove_axes

_CASTS = {"to", "type_as", "type", "float", "half", "bfloat16", "double"}  # they would round the numbers
_STEPS = 16  # nodes between a kernel and the projection


@dataclass(frozen=True)
class Joined:
    """Axes of what an attention gave, and the graph's input that is the weight which joins its heads; None: unknown."""

    axes: Axes | None = None
    weight: fx.Node | None = None


def joined(node: fx.Node, mixed: Sequence[int], width: int) -> Joined:
    """Follow what an attention gives to the linear function that it enters as it is.

    Args:
        node: the attention. mixed, width: as of `prove_axes`.
    """
    empty = like(node)
    if not isinstance(empty, Tensor):
        return Joined()
    start = torch.arange(empty.numel(), dtype=torch.float64).view(empty.shape) + 1
    rank = start.dim()
    mixed = [axis % rank for axis in mixed]
    at: list[tuple[fx.Node, Tensor]] = [(node, start)]
    seen = {node}
    while at and len(seen) < _STEPS:
        before, counted = at.pop(0)
        for user in before.users:
            if user in seen:
                continue
            seen.add(user)
            function = wanted_function(user)
            if function in LINEAR_FUNCTIONS:
                found = _entered(user, function, before, counted, start, mixed, width % rank)
                if found.axes is not None:
                    return found
            elif function is not None and (given := _moved(user, function, before, counted)) is not None:
                at.append((user, given))
    return Joined()


def _moved(user: fx.Node, function: Any, before: fx.Node, counted: Tensor) -> Tensor | None:
    """What a node makes of the counted elements; None if others come in, or they do not stay what they are."""
    others = [one for one in user.all_input_nodes if one is not before]
    if any(isinstance(one.meta.get("example_value"), Tensor) for one in others):
        return None
    if user.op == "call_method" and user.target in _CASTS:
        return counted
    values = {one: like(one) for one in others}
    try:
        args, kwargs = (resolved(each, lambda one: counted if one is before else values[one]) for each in
                        (user.args, user.kwargs))  # fmt: skip
        made = function(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    return made if isinstance(made, Tensor) and made.numel() == counted.numel() else None


def _entered(
    user: fx.Node, function: Any, before: fx.Node, counted: Tensor, start: Tensor, mixed: Sequence[int], width: int
) -> Joined:
    """Axes, if what enters this linear function is all that the attention gave."""
    args = [counted if one is before else like(one) if isinstance(one, fx.Node) else one for one in user.args]
    try:
        p = projected(function, args)
        if p is None or p.device.type == "meta" or p.numel() != start.numel():
            return Joined()
        proof = prove_axes(start, p, mixed, width)
    except WorkbenchError:
        return Joined()
    if proof is None or proof.axes is None or proof.gate or proof.within:
        return Joined()
    weights = [one for one in user.all_input_nodes if one is not before]
    return Joined(proof.axes, next((_origin(one) for one in weights if _is_matrix(one)), None))


def _is_matrix(node: fx.Node) -> bool:
    given = node.meta.get("example_value")
    return isinstance(given, Tensor) and given.dim() >= 2


def _origin(node: fx.Node) -> fx.Node:
    """The input of the graph that a weight is a view of."""
    while node.op in ("call_method", "call_function") and len(node.all_input_nodes) == 1 and node.target in _TURNS:
        node = node.all_input_nodes[0]
    return node


_TURNS = {"t", "transpose", "permute", operator.getitem, torch.t, torch.transpose, getattr}
