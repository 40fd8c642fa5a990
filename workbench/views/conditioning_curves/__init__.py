"""Conditioning curves: convergence of a linear memory before and after its keys are rescaled."""

from workbench.views.base.kinds import register_kind
from workbench.views.conditioning_curves.view import ConditioningCurves, conditioning_curves

__all__ = ["ConditioningCurves", "conditioning_curves"]

register_kind("conditioning_curves", __package__)
