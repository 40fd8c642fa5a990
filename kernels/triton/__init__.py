"""Fused Triton kernels for the statistics of a softmax on a GPU; triton itself is imported when it is needed."""

from workbench.kernels.triton.engine import TritonEngine

__all__ = ["TritonEngine"]
