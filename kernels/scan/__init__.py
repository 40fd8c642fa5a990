"""Attention as a recurrent network (Aaren, arXiv 2405.13956): one learned query per head, read over every prefix."""

from workbench.kernels.scan.functional import ScanState, scan_attention
from workbench.kernels.scan.naive import naive_pattern, naive_scan
from workbench.kernels.scan.operator import Sums, combine, leaves, tree_scan
from workbench.kernels.scan.pattern import ScanPattern

__all__ = [
    "ScanPattern",
    "ScanState",
    "Sums",
    "combine",
    "leaves",
    "naive_pattern",
    "naive_scan",
    "scan_attention",
    "tree_scan",
]
