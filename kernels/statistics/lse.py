"""`lse`: the log of the softmax denominator."""

from __future__ import annotations

import math

from workbench.kernels.statistics.record import Statistic, register

LSE = register(
    Statistic(
        "lse",
        "query",
        "nats",
        "log of the softmax denominator",
        lambda rows: rows.scores_lse(),
        formula=r"\ln \sum_j e^{s_{ij}}",
        empty=-math.inf,
        value_weighted=False,
        merge=lambda shards: shards.whole,
        of_pattern=lambda pattern: pattern.lse,
    )
)
