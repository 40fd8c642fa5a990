"""Everything numeric about attention patterns: lazy patterns, masks, statistics and the kernels that stream them."""

from workbench.kernels.cascades import CASCADES, Cascade, Equation, compare
from workbench.kernels.plan import Pass, Plan, passes

__all__ = ["CASCADES", "Cascade", "Equation", "Pass", "Plan", "compare", "passes"]
