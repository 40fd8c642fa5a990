"""Statistics of |A| on a GPU, for recurrences whose heads fade as a whole: by the kernels of softmaxes.

|A[i, j]| = |q_i·k_j| exp(G_i − G_j), with G the sums of log decays, is in each row the softmax of ln |q_i·k_j| − G_j.
The kernels count G from the first row of each tile, so that it stays small where weights are not nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from workbench.kernels.masks import Mask
from workbench.kernels.plan import Pass
from workbench.kernels.softmax_problem import SoftmaxProblem
from workbench.kernels.statistics import Options
from workbench.kernels.triton import engine

FORGOTTEN = -100.0
"""A log decay of which nothing is left in float32, small enough for sums of it to be exact."""


@dataclass(frozen=True)
class Magnitudes:
    """|A| of one recurrence.

    Args:
        q, k: [batch, group, position, d]; the heads are split evenly among the groups of each.
        n_heads: of all.
        fades: makes G, [batch or 1, head, position] float64, where a position adds no less than FORGOTTEN; None for no
            decay.
        row_sums: gives Σ A of each row [batch, head, query], when that is asked for.
    """

    q: Tensor
    k: Tensor
    n_heads: int
    fades: Callable[[], Tensor | None]
    row_sums: Callable[[], Tensor]

    def refusal(self, names: Sequence[str], options: Options) -> str | None:
        """Why the kernels cannot make these here; None if they can."""
        return engine.refusal(SoftmaxProblem(self.q, self.k, self._mask, 1.0, of_magnitudes=True), names, options)

    def collect(self, each: Pass, options: Options, lse: Tensor | None) -> dict[str, Tensor]:
        """The raw sums of one pass, with "lse" where that is None; see `FusedMagnitudes`."""
        q, fades = self._queries_and_fades
        problem = SoftmaxProblem(q, self.k, self._mask, 1.0, lse=lse, of_magnitudes=True, fades=fades)
        return engine.raw(problem, each.statistics, options)

    @cached_property
    def _mask(self) -> Mask:
        return Mask(self.q.shape[2], self.q.shape[2], causal=True)

    @cached_property
    def _queries_and_fades(self) -> tuple[Tensor, Tensor | None]:
        """The queries of each head, a view where that can be, and G."""
        q, each = self.q, self.n_heads // self.q.shape[1]
        if q.shape[1] == 1:
            return q.expand(-1, each, -1, -1), self.fades()
        return q if each == 1 else q.repeat_interleave(each, dim=1), self.fades()


def sums_of_logs(log_decay: Tensor | None) -> Tensor | None:
    """G of log decays [batch, head, position], float64."""
    return None if log_decay is None else log_decay.clamp(min=FORGOTTEN).cumsum(-1, dtype=torch.float64)
