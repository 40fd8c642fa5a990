"""Does cross-attention explain? Its maps, and how they compare with saliency."""

from workbench.analysis.cross_attention.comparison import cross_attention_saliency
from workbench.analysis.cross_attention.maps import cross_attention
from workbench.analysis.cross_attention.maps_result import CrossAttention
from workbench.analysis.cross_attention.result import CrossAttentionSaliency

__all__ = ["CrossAttention", "CrossAttentionSaliency", "cross_attention", "cross_attention_saliency"]
