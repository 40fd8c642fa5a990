"""Statistics of softmax patterns on the CPU in one fused pass, from C++ that is compiled once per machine."""

from workbench.kernels.native.launch import statistics, unsupported

__all__ = ["statistics", "unsupported"]
