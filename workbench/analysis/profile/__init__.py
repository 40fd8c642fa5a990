"""How far heads look and how they spread their weight: `attention_profile`."""

from workbench.analysis.profile.result import AttentionProfile
from workbench.analysis.profile.run import attention_profile

__all__ = ["AttentionProfile", "attention_profile"]
