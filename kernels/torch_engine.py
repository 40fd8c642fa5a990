"""The engine that can make everything: tiles of a softmax in plain torch, on any device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from workbench.kernels import streaming
from workbench.kernels.plan import Pass
from workbench.kernels.softmax_problem import SoftmaxProblem
from workbench.kernels.softmax_tiles import SoftmaxTiles
from workbench.kernels.statistics import Options


class TorchEngine:
    """Streams tiles in plain torch."""

    name = "torch"

    def refusal(self, problem: SoftmaxProblem, names: Sequence[str], options: Options) -> str | None:
        """None: what has a record can be collected."""
        return None

    def raw(self, problem: SoftmaxProblem, names: Sequence[str], options: Options) -> dict[str, Tensor]:
        """One pass over tiles."""
        each = Pass(tuple(names), finds_denominators=problem.lse is None)
        raw, found = streaming.collect(SoftmaxTiles(problem), each, options)
        return raw if found is None else raw | {"lse": found.total.to(problem.dtype)}
