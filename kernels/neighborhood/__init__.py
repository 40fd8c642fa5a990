"""Generalized Neighborhood Attention (arXiv 2504.16922): windows with stride, dilation and causality in 1-D to 3-D."""

from workbench.kernels.neighborhood.attention import NeighborhoodPattern, neighborhood_attention, pattern
from workbench.kernels.neighborhood.axis import Axis
from workbench.kernels.neighborhood.fewest import fewest_blocks
from workbench.kernels.neighborhood.layout import NeighborhoodLayout, token_permutation
from workbench.kernels.neighborhood.naive import neighborhood_naive
from workbench.kernels.neighborhood.neighbors import neighbor_weights
from workbench.kernels.neighborhood.simulator import (
    end_to_end,
    flop_bound,
    perfectly_block_sparse,
    simulated_speedup,
    visited_tiles,
)

__all__ = [
    "Axis",
    "NeighborhoodLayout",
    "NeighborhoodPattern",
    "end_to_end",
    "fewest_blocks",
    "flop_bound",
    "neighbor_weights",
    "neighborhood_attention",
    "neighborhood_naive",
    "pattern",
    "perfectly_block_sparse",
    "simulated_speedup",
    "token_permutation",
    "visited_tiles",
]
