"""Everything numeric about attention patterns: lazy patterns, masks, statistics and the kernels that stream them."""

from workbench.kernels.plan import Pass, Plan, passes

__all__ = ["Pass", "Plan", "passes"]
