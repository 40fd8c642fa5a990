"""Everything numeric about attention patterns: lazy patterns, masks, statistics and the kernels that stream them."""
