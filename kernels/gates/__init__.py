"""Gates, which multiply what stands at a position by a factor, and additive maps, whose entries add up to a number."""

from workbench.kernels.gates.additive import AdditivePattern
from workbench.kernels.gates.pattern import GatePattern, gate_map

__all__ = ["AdditivePattern", "GatePattern", "gate_map"]
