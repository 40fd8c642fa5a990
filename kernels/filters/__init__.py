"""Maps of depth-wise convolutions over images."""

from workbench.kernels.filters.depthwise import DepthwisePattern, composite_kernel

__all__ = ["DepthwisePattern", "composite_kernel"]
