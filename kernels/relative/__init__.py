"""Softmax attention whose scores know how far a key lies from a query, by learned tables (Transformer-XL, RCMHA)."""

from workbench.kernels.relative.attention import relative_attention
from workbench.kernels.relative.pattern import RelativePattern

__all__ = ["RelativePattern", "relative_attention"]
