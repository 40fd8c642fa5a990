"""Maps that are made of other maps: products, as of agents and landmarks, and maps whose rows are weighted by gates."""

from workbench.kernels.composed.agents import agent_attention
from workbench.kernels.composed.gated import RowGatedPattern, gated_attention
from workbench.kernels.composed.product import ComposedPattern

__all__ = ["ComposedPattern", "RowGatedPattern", "agent_attention", "gated_attention"]
