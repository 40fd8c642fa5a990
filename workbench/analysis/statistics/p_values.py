"""p-values, one home for all analyses: how often chance reaches what was found.

docs/simulations.md shows how often each is small where only chance is at work; benchmarks/simulations.py has a row for
each place that prints one.
"""

from __future__ import annotations

from torch import Tensor

_ROUNDING = 1e-12


def among_draws(null: Tensor, found: float) -> float:
    """Share of draws [draw] of chance that reach what was found, the found one included, so that it is never 0.

    >>> import torch
    >>> among_draws(torch.tensor([0.1, 0.2, 0.3]), 0.3)
    0.5
    """
    return (1 + int((null >= found - _ROUNDING).sum())) / (1 + len(null))
