"""Softmax attention whose scores know how far a key lies back, and the parts that they are made of."""

from workbench.kernels.relative.attention import RelativePattern, relative_attention
from workbench.kernels.relative.scores import ScorePattern

__all__ = ["RelativePattern", "ScorePattern", "relative_attention"]
