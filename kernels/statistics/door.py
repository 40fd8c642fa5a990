r"""`workbench.statistic`: statistics of one's own, which captures, tables, files and views then know.

    @workbench.statistic(unit="nats", meaning="Rényi entropy of order 2", formula=r"-\ln \sum_j p_{ij}^2")
    def renyi2(rows):                               # the definition: rows.p is [batch, head, query, key] in float64
        return -rows.p.square().sum(-1).log()       # [batch, head, query]

    with wb.capture(statistics=["renyi2", "value_weighted_renyi2"]) as cap: ...

So it is computed from whole rows, a few at a time. To collect it from tiles, as fast statistics are, give it an
`Accumulator` (`workbench.kernels.statistics`), as column statistics need:

    class Squares(RowSum):                          # sums over a row; Accumulator for anything else
        def add(self, tile): self.of_tiles.append(tile.p.square().sum(-1))
        def results(self): return {"squares": self.total}
        def rescale(self, rows, online): self.total[rows] *= online.factor.square()
        def normalise(self, denominator, mass): self.total /= denominator.square()

    @workbench.statistic(collect=Squares, finish=lambda raw, space, options: -raw["squares"].log(), ...)

One of this package is a file of this folder that calls `register`, and a line in `__init__`; the C++ library and the
Triton kernels take over what has a line in theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.errors import CaptureError
from workbench.kernels.statistics.by_definition import Definition
from workbench.kernels.statistics.record import STATISTICS, Axes, Statistic, register


def statistic(
    *, meaning: str, unit: str = "", axes: Axes = "query", name: str | None = None, **fields: Any
) -> Callable[[Definition], Statistic]:
    """Register a statistic whose definition is the decorated function of `WholeRows`.

    Args:
        meaning: one line of what it is, for captions.
        unit: of its values; "mass" for what runs from 0 to 1.
        axes: what follows [batch, head].
        name: the function's own if None.
        fields: others of `workbench.kernels.statistics.Statistic`.

    Returns:
        The record. Decorating the same function again, as a notebook's cell does, replaces it.

    Raises:
        CaptureError: the name is taken or no identifier, or a column statistic has no `collect`.

    >>> import torch
    >>> from workbench.kernels.patterns import DensePattern
    >>> @statistic(unit="mass", meaning="weight on the last key")
    ... def on_last_key(rows):
    ...     return rows.p[..., -1]
    >>> DensePattern(torch.eye(3)[None, None]).statistics(["on_last_key"])["on_last_key"].tolist()
    [[[0.0, 0.0, 1.0]]]
    >>> from workbench.kernels.statistics import unregister
    >>> unregister("on_last_key")
    """

    def decorate(define: Definition) -> Statistic:
        called = name or str(getattr(define, "__name__", ""))
        try:
            record = Statistic(called, axes, unit, meaning, define, **fields)
        except TypeError as error:
            raise CaptureError(
                f"a statistic has no such field: {error}", hint="see Statistic for those it has"
            ) from None
        known = STATISTICS.get(called)
        if known is not None and _place(known.define) == _place(define):
            STATISTICS[called] = record
            return record
        return register(record)

    return decorate


def _place(function: Any) -> tuple[str, str] | object:
    """Where a function was defined; lambdas of one module cannot be told apart."""
    named = getattr(function, "__qualname__", "<lambda>")
    return object() if named.endswith("<lambda>") else (function.__module__, named)
