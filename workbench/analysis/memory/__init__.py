"""Memory of trackers: which past frames are kept, and which of several histories is believed."""

from workbench.analysis.memory.tree import MemoryTree, Node, Seen, grow_memory_tree, key_factors, memory_frames

__all__ = ["MemoryTree", "Node", "Seen", "grow_memory_tree", "key_factors", "memory_frames"]
