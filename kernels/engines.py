"""What streams the statistics of a softmax: engines, asked one after the other whether they can.

Plain torch makes everything that has a record; C++ on the CPU and Triton on a GPU make most of it faster. An engine of
one's own is an object with these three members:

>>> import torch
>>> class Constant:
...     name = "constant"
...
...     def refusal(self, problem, names, options):
...         return None if set(names) == {"entropy"} else "it knows entropy alone"
...
...     def raw(self, problem, names, options):
...         found = {"entropy": torch.zeros(problem.shape[:3])}
...         return found if problem.lse is not None else found | {"lse": torch.zeros(problem.shape[:3])}
>>> register(Constant())
>>> [engine.name for engine in registered()][0]
'constant'
>>> unregister("constant")

An engine that is registered later is asked earlier. It refuses every name and every option that it does not know: a
user may have added either. It is asked for all of the names first, then for each, and the next engine takes the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from workbench.errors import CaptureError, nearest
from workbench.kernels.softmax_problem import SoftmaxProblem
from workbench.kernels.statistics import Options


class Engine(Protocol):
    """Streams statistics of softmax problems.

    Attributes:
        name: as it stands in a capture's provenance.
    """

    @property
    def name(self) -> str: ...

    def refusal(self, problem: SoftmaxProblem, names: Sequence[str], options: Options) -> str | None:
        """Why it cannot make these statistics of this problem; None if it can."""

    def raw(self, problem: SoftmaxProblem, names: Sequence[str], options: Options) -> dict[str, Tensor]:
        """The raw sums that these statistics are finished from, in one pass over the keys.

        A statistic without a `finish` is finished from its own outputs. Rows that see no key may hold anything. Where
        `problem.lse` is None it is found, and is among the results as "lse" [batch, head, query]; `names` are then row
        statistics, or none.
        """


_ENGINES: list[Engine] = []


def register(engine: Engine) -> None:
    """Ask this engine before those that are there.

    Raises:
        CaptureError: there is one of that name.
    """
    if any(known.name == engine.name for known in _ENGINES):
        raise CaptureError(f'there is an engine "{engine.name}" already', hint=f'unregister("{engine.name}") first')
    _ENGINES.insert(0, engine)


def unregister(name: str) -> None:
    """Ask the engine of this name no more.

    Raises:
        CaptureError: there is none.
    """
    for engine in _ENGINES:
        if engine.name == name:
            _ENGINES.remove(engine)
            return
    raise CaptureError(f'there is no engine "{name}"', hint=nearest(name, [known.name for known in _ENGINES]))


def registered() -> tuple[Engine, ...]:
    """All engines, in the order in which they are asked."""
    return tuple(_ENGINES)


def assign(problem: SoftmaxProblem, names: Sequence[str], options: Options) -> list[tuple[Engine, tuple[str, ...]]]:
    """Which engine makes which of these statistics; one of them makes none where there are no names.

    Raises:
        CaptureError: no engine can make one of them; the message says why not.
    """
    left, found, reasons = tuple(names), [], []
    for engine in _ENGINES:
        why = engine.refusal(problem, left, options)
        taken = left if why is None else tuple(n for n in left if engine.refusal(problem, (n,), options) is None)
        if why is None or taken:
            found.append((engine, taken))
        if why is None:
            return found
        reasons.append(f"{engine.name}: {why}")
        left = tuple(name for name in left if name not in taken)
    raise CaptureError(f"no engine can make {', '.join(left) or 'the denominators'}", hint="; ".join(reasons))


def collect(problem: SoftmaxProblem, names: Sequence[str], options: Options) -> dict[str, Tensor]:
    """The raw sums of one pass, by the engines that can; "lse" among them where the problem has none."""
    raw: dict[str, Tensor] = {}
    for engine, some in assign(problem, names, options):
        raw |= engine.raw(problem, some, options)
        if problem.lse is None:
            problem = replace(problem, lse=raw["lse"].clamp(min=-1e20))
    return raw


def unknown(names: Sequence[str], options: Options, known: Collection[str], takes: Collection[str]) -> str | None:
    """Why an engine that knows these names and takes these options has to refuse; None if it need not."""
    strange = [name for name in names if name not in known]
    if strange:
        return f'it has no "{strange[0]}"'
    given = [name for name in options.given() if name not in takes]
    return f"it does not know the option {given[0]}" if given else None
