"""What gates do: how large their factors are, where, and how much they change with the input."""

from workbench.analysis.gates.profile import GateProfile, gate_profile

__all__ = ["GateProfile", "gate_profile"]
