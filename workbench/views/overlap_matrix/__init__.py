"""Overlap matrix: how much each two of several circuits share, and the graph of the chosen pair."""

from workbench.views.base.kinds import register_kind
from workbench.views.overlap_matrix.view import OverlapMatrix, overlap_matrix

__all__ = ["OverlapMatrix", "overlap_matrix"]

register_kind("overlap_matrix", __package__)
