"""State-space mixers as hidden attention: the maps that Mamba (S6) and Mamba-2 (SSD) apply to their values."""

from workbench.kernels.state_space.naive import naive_dual, naive_selective
from workbench.kernels.state_space.pattern import DualPattern, SelectivePattern

__all__ = ["DualPattern", "SelectivePattern", "naive_dual", "naive_selective"]
