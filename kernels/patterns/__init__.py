"""Lazy attention patterns, and those that are held whole."""

from workbench.kernels.patterns.base import Grade, MagnitudePattern, Pattern
from workbench.kernels.patterns.dense import DensePattern, SignedPattern
from workbench.kernels.patterns.part_of_heads import PartOfHeads, in_whole
from workbench.kernels.patterns.tiled import DENSE_LIMIT, Tiled

__all__ = [
    "DENSE_LIMIT",
    "DensePattern",
    "Grade",
    "MagnitudePattern",
    "PartOfHeads",
    "Pattern",
    "SignedPattern",
    "Tiled",
    "in_whole",
]
