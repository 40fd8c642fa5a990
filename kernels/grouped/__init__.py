"""Attention inside groups of positions: shifted groups, blocks with a halo, clusters; what is outside is never made."""

from workbench.kernels.grouped.attention import group_weights
from workbench.kernels.grouped.halo import halo_attention, halo_groups
from workbench.kernels.grouped.local import local_attention, local_groups
from workbench.kernels.grouped.pattern import GroupedPattern
from workbench.kernels.grouped.routing import clusters_of, mean_of_groups, routing_attention
from workbench.kernels.grouped.shifted import ShiftedLayout, ShiftedPattern, shifted_attention

__all__ = [
    "GroupedPattern",
    "ShiftedLayout",
    "ShiftedPattern",
    "clusters_of",
    "group_weights",
    "halo_attention",
    "halo_groups",
    "local_attention",
    "local_groups",
    "mean_of_groups",
    "routing_attention",
    "shifted_attention",
]
