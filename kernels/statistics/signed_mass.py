"""`signed_mass`: what the signs of a row's weights cancel."""

from __future__ import annotations

from torch import Tensor

from workbench.kernels.statistics.record import Statistic, register
from workbench.kernels.statistics.whole_rows import WholeRows


def _define(rows: WholeRows) -> Tensor:
    assert rows.signed is not None
    assert rows.size is not None
    return rows.signed / rows.size


SIGNED_MASS = register(
    Statistic(
        "signed_mass",
        "query",
        "share",
        "Σ A / Σ |A|: 1 where no weight is negative",
        _define,
        formula=r"\sum_j A_{ij} \big/ \sum_j \lvert A_{ij} \rvert",
        range=(-1, 1),
        of_gates=True,
        value_weighted=False,
        of_pattern=lambda pattern: pattern.signed_mass,
    )
)
