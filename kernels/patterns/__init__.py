"""Lazy attention patterns, and those that are held whole."""

from workbench.kernels.patterns.base import DENSE_LIMIT, Grade, MagnitudePattern, Pattern
from workbench.kernels.patterns.dense import DensePattern

__all__ = ["DENSE_LIMIT", "DensePattern", "Grade", "MagnitudePattern", "Pattern"]
