"""Attention as conditioning: associative memories, the theory of their capacity, and probes of real heads.

After "Understanding Transformers through the Lens of Pavlovian Conditioning" (arXiv 2508.08289, v1): keys are
conditional stimuli, values unconditional ones, queries test what was associated.
"""

from workbench.analysis.conditioning import theory
from workbench.analysis.conditioning.features import FEATURES, feature_map
from workbench.analysis.conditioning.memories import RULES, Memory, memory
from workbench.analysis.conditioning.stacks import StackFailures, simulate_stack

__all__ = ["FEATURES", "RULES", "Memory", "StackFailures", "feature_map", "memory", "simulate_stack", "theory"]
