"""Attention itself as work that any device can do: documents cut into items, moved until all devices have as much.

Core attention disaggregation (arXiv 2510.18121): softmax(q kᵀ) v has no parameters and no state, and its rows are
independent. A batch of packed documents costs each device as many tokens, but not as many pairs of tokens.
"""

from workbench.kernels.disaggregation.execute import attend
from workbench.kernels.disaggregation.items import Item, Sizes, packed
from workbench.kernels.disaggregation.planner import Move, Plan, plan
from workbench.kernels.disaggregation.simulator import Devices, Model, Simulated, simulate

__all__ = [
    "Devices",
    "Item",
    "Model",
    "Move",
    "Plan",
    "Simulated",
    "Sizes",
    "attend",
    "packed",
    "plan",
    "simulate",
]
