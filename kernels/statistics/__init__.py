"""The statistics of a pattern: one file each, or one for those that share their work, and what they have in common.

p is one row A[b, h, i, :] over the keys that query i may see. A query that sees no key has no distribution: its row
statistics are NaN, its `lse` is -inf, its keys are -1, and it adds nothing to column statistics.
"""

# Importing a file registers its statistics; they are listed in this order.
from workbench.kernels.statistics import (  # isort: skip
    lse,
    entropy,
    peak,
    effective_keys,
    distance,
    sink,
    diagonal,
    induction,
    signed_mass,
    row_sum,
    received,
    top_keys,
    pooled,
)
from workbench.kernels.statistics.accumulator import Accumulator, RowSum
from workbench.kernels.statistics.dense import dense
from workbench.kernels.statistics.door import statistic
from workbench.kernels.statistics.finish import finish
from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.record import (
    STATISTICS,
    VALUE_WEIGHTED,
    Statistic,
    check_names,
    known,
    output_names,
    register,
    unregister,
)
from workbench.kernels.statistics.whole_rows import WholeRows

__all__ = [
    "STATISTICS",
    "VALUE_WEIGHTED",
    "Accumulator",
    "Options",
    "RowSum",
    "Statistic",
    "WholeRows",
    "check_names",
    "dense",
    "diagonal",
    "distance",
    "effective_keys",
    "entropy",
    "finish",
    "induction",
    "known",
    "lse",
    "output_names",
    "peak",
    "pooled",
    "received",
    "register",
    "row_sum",
    "signed_mass",
    "sink",
    "statistic",
    "top_keys",
    "unregister",
]
