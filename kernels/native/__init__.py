"""Statistics of a softmax on the CPU in one fused pass, from C++ that is compiled once per machine."""

from workbench.kernels.native.engine import NativeEngine

__all__ = ["NativeEngine"]
