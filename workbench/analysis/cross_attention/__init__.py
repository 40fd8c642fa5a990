"""Does cross-attention explain? Its maps, and how they compare with saliency."""

from workbench.analysis.cross_attention.maps import cross_attention
from workbench.analysis.cross_attention.maps_result import CrossAttention
from workbench.analysis.cross_attention.result import CrossAttentionSaliency
from workbench.analysis.cross_attention.run import cross_attention_saliency

__all__ = ["CrossAttention", "CrossAttentionSaliency", "cross_attention", "cross_attention_saliency"]
