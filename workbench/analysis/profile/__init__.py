"""How far heads look and how they spread their weight: `attention_profile`."""

from workbench.analysis.profile.measuring import attention_profile
from workbench.analysis.profile.result import AttentionProfile

__all__ = ["AttentionProfile", "attention_profile"]
