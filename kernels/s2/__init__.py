"""S2-Attention (arXiv 2407.17678): local blocks and verticals, shifted from head to head."""

from workbench.kernels.s2.attention import S2Pattern, pattern, s2_attention
from workbench.kernels.s2.cache import S2Cache, decode
from workbench.kernels.s2.layout import S2Layout, Shards
from workbench.kernels.s2.lists import check_union, csr, kv_efficient, merged_csr
from workbench.kernels.s2.naive import s2_naive

__all__ = [
    "S2Cache",
    "S2Layout",
    "S2Pattern",
    "Shards",
    "check_union",
    "csr",
    "decode",
    "kv_efficient",
    "merged_csr",
    "pattern",
    "s2_attention",
    "s2_naive",
]
