"""Which masks of a graph are one and the same, told from what they are computed of: nothing is compared as it runs."""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

_WRITES = {
    operator.setitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.iand,
    operator.ior,
    operator.itruediv,
}
_DRAWS = ("rand", "dropout", "bernoulli", "multinomial", "normal", "empty")  # no two of them give the same


class Expressions:
    """The nodes of a graph by what they compute: those of one number hold the same, throughout one run."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph

    def number(self, node: Any) -> int | None:
        """That of a node; None for what is no node, or may be written to while the graph runs."""
        if not isinstance(node, fx.Node) or self._written & _sources(node):
            return None
        return self._numbers[node]

    @cached_property
    def _numbers(self) -> dict[fx.Node, int]:
        """Of each node, in the graph's order: what it needs comes before it."""
        known, numbers = dict[Any, int](), dict[fx.Node, int]()
        for node in self._graph.nodes:
            key: Any = node.op, node.name
            if node.op in ("call_function", "call_method") and not _draws(node):
                given = fx.map_arg((node.args, node.kwargs), lambda one: f"%{numbers[one]}")
                key = node.op, node.target, repr(given)
            numbers[node] = known.setdefault(key, len(known))
        return numbers

    @cached_property
    def _written(self) -> set[fx.Node]:
        """Tensors from which comes something that is written to."""
        written = (one for node in self._graph.nodes if _writes(node) for one in node.all_input_nodes[:1])
        return set[fx.Node]().union(*map(_sources, written))


def _writes(node: fx.Node) -> bool:
    name = str(node.target)
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    called = getattr(node.target, "__name__", "")
    in_place = called.endswith("_") and not called.endswith("__")
    return node.op == "call_function" and (node.target in _WRITES or in_place or "out" in node.kwargs)


def _draws(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return any(word in name for word in _DRAWS) or isinstance(node.target, torch._ops.HigherOrderOperator)


def _sources(node: fx.Node) -> set[fx.Node]:
    """A node and those that it is computed of which hold tensors."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        at = waiting.pop()
        if at not in found and isinstance(at.meta.get("example_value"), Tensor):
            found.add(at)
            waiting.extend(at.all_input_nodes)
    return found


class Runs(threading.local):
    """Numbers the runs of graphs, by their attention: where one fires again, another run has begun."""

    _next: Iterator[int] = itertools.count()

    def __init__(self) -> None:
        self._of: dict[int, tuple[int, set[int]]] = {}

    def of(self, graph: int, place: int) -> int:
        """The number of the run in which this place of a graph fires now: no two are the same in a process."""
        run, fired = self._of.get(graph, (-1, set()))
        if run < 0 or place in fired:
            run, fired = next(self._next), set()
        fired.add(place)
        self._of[graph] = run, fired
        return run
