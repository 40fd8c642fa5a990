"""How many passes over the keys a set of statistics needs, and in which pass each is found (FuseMax, arXiv 2406.10491).

A pass reads every key once per tile of queries. A second one is needed, whatever the algorithm, by what must know a
value that depends on all keys: sums over *queries* of normalised weights need each row's denominator first. Row
statistics do not: they are collected on a running scale and divided in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workbench.kernels.statistics.record import VALUE_WEIGHTED, check_names, known


@dataclass(frozen=True)
class Pass:
    """One traversal of the keys.

    Attributes:
        statistics: what is found in it.
        finds_denominators: whether it also finds each row's denominator, for a pass that follows.
    """

    statistics: tuple[str, ...]
    finds_denominators: bool


@dataclass(frozen=True)
class Plan:
    """The passes that `streaming` makes, in order.

    Attributes:
        passes: those over the plain weights. weighted: those over the value-weighted ones, which have denominators of
            their own.
        needed: how many passes any algorithm needs that keeps O(queries + keys) numbers; value-weighted statistics
            could share the plain ones' passes, so that it may be less than the passes made.
    """

    passes: tuple[Pass, ...]
    weighted: tuple[Pass, ...]

    @property
    def needed(self) -> int:
        return max(len(self.passes), len(self.weighted))

    def key_reads(self, n_query_tiles: int) -> int:
        """How often each key is read where every tile of queries sees it."""
        return n_query_tiles * (len(self.passes) + len(self.weighted))

    def __repr__(self) -> str:
        lines = []
        for label, several in (("", self.passes), ("value-weighted ", self.weighted)):
            for i, each in enumerate(several, 1):
                found = [*each.statistics, *(["denominators"] if each.finds_denominators else [])]
                lines.append(f"{label}pass {i}: {', '.join(found)}")
        n = len(self.passes) + len(self.weighted)
        return "\n  ".join((f"Plan({n} pass{'' if n == 1 else 'es'}, {self.needed} needed)", *lines))


def passes(statistics: Sequence[str], *, denominators_known: bool = False) -> Plan:
    """The plan for some statistics.

    Args:
        statistics: names, as in a capture.
        denominators_known: the kernel gave its log-sum-exp, so that one pass is enough for all.

    Raises:
        CaptureError: unknown name.

    >>> passes(["entropy", "peak"]).needed, passes(["entropy", "received"]).needed
    (1, 2)
    >>> passes(["entropy", "received"], denominators_known=True).needed
    1
    """
    names = check_names(statistics)
    plain = [name for name in names if not name.startswith(VALUE_WEIGHTED)]
    weighted = [name.removeprefix(VALUE_WEIGHTED) for name in names if name.startswith(VALUE_WEIGHTED)]
    return Plan(_passes(plain, denominators_known), _passes(weighted, False))


def _passes(names: list[str], denominators_known: bool) -> tuple[Pass, ...]:
    if denominators_known:
        streamed = tuple(name for name in names if known(name).of_pattern is None)
        return (Pass(streamed, False),) if streamed else ()
    second = tuple(name for name in names if known(name).needs_denominators)
    first = Pass(tuple(name for name in names if name not in second), True)
    return (first, Pass(second, False)) if second else (first,) if names else ()
