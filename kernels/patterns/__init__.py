"""Lazy attention patterns, and those that are held whole."""

from workbench.kernels.patterns.base import DENSE_LIMIT, Grade, MagnitudePattern, Pattern
from workbench.kernels.patterns.dense import DensePattern, SignedPattern
from workbench.kernels.patterns.part_of_heads import PartOfHeads, in_whole

__all__ = [
    "DENSE_LIMIT",
    "DensePattern",
    "Grade",
    "MagnitudePattern",
    "PartOfHeads",
    "Pattern",
    "SignedPattern",
    "in_whole",
]
