"""`row_sum`: what the weights of a row add up to, which is the factor of a gate."""

from __future__ import annotations

from torch import Tensor

from workbench.kernels.statistics.record import Statistic, register
from workbench.kernels.statistics.whole_rows import WholeRows


def _define(rows: WholeRows) -> Tensor:
    assert rows.signed is not None
    return rows.signed


ROW_SUM = register(
    Statistic(
        "row_sum",
        "query",
        "factor",
        "Σ A: 1 of a softmax, the factor of a gate",
        _define,
        formula=r"\sum_j A_{ij}",
        empty=0.0,
        of_gates=True,
        value_weighted=False,
        of_pattern=lambda pattern: pattern.row_sum,
    )
)
