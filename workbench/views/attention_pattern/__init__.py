"""Attention pattern: what each query looks at, head by head."""

from workbench.views.attention_pattern.view import AttentionPattern, attention_pattern
from workbench.views.base.kinds import register_kind

__all__ = ["AttentionPattern", "attention_pattern"]

register_kind("attention_pattern", __package__)
