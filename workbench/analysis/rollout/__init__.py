"""Which tokens a position is made of, through attention: `attention_rollout` and the maps that it chains."""

from workbench.analysis.rollout.result import AttentionRollout
from workbench.analysis.rollout.rollout import attention_rollout

__all__ = ["AttentionRollout", "attention_rollout"]
