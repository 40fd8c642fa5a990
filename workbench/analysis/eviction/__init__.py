"""What heads lose when a cache keeps some keys alone: which ones a policy evicts, and the weight that lay on them."""

from workbench.analysis.eviction.evict import eviction
from workbench.analysis.eviction.result import Eviction

__all__ = ["Eviction", "eviction"]
