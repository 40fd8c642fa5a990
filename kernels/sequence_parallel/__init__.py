"""Attention over a sequence whose parts lie on several processes: linear (LASP-2) and softmax, and their statistics.

Every process holds consecutive positions, and calls the same functions in the same order; gradients flow. What is sent
is counted by `SplitSequence.sent`.
"""

from workbench.kernels.sequence_parallel.linear import split_lightning_attention, split_linear_attention
from workbench.kernels.sequence_parallel.softmax import split_attention
from workbench.kernels.sequence_parallel.split import Sent, SplitSequence
from workbench.kernels.sequence_parallel.statistics import split_statistics

__all__ = [
    "Sent",
    "SplitSequence",
    "split_attention",
    "split_lightning_attention",
    "split_linear_attention",
    "split_statistics",
]
