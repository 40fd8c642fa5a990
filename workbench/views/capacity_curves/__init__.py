"""Capacity curves: what one head holds as more pairs are stored, beside the theory."""

from workbench.views.base.kinds import register_kind
from workbench.views.capacity_curves.view import MEASURE_LABELS, CapacityCurves, capacity_curves

__all__ = ["MEASURE_LABELS", "CapacityCurves", "capacity_curves"]

register_kind("capacity_curves", __package__)
