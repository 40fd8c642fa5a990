"""Memory of trackers: what is read of past frames, which are kept, and which of several histories is believed."""

from workbench.analysis.memory.long import Tracked, track_long
from workbench.analysis.memory.reading import memory_reading
from workbench.analysis.memory.result import MemoryReading
from workbench.analysis.memory.tree import MemoryTree, Node, Seen, grow_memory_tree, key_factors, memory_frames

__all__ = ["MemoryReading", "MemoryTree", "Node", "Seen", "Tracked", "grow_memory_tree", "key_factors",
           "memory_frames", "memory_reading", "track_long"]  # fmt: skip
