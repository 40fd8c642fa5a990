"""Attention whose exponential is cut off after the square: positive weights, in linear time."""

from workbench.kernels.taylor.attention import TaylorPattern, taylor_attention

__all__ = ["TaylorPattern", "taylor_attention"]
