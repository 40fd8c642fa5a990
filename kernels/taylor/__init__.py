"""Attention whose exponential is its polynomial of the second order."""

from workbench.kernels.taylor.attention import TaylorPattern, taylor_attention

__all__ = ["TaylorPattern", "taylor_attention"]
