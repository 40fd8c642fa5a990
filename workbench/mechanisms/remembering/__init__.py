"""Memories of what was seen: SAM2Act's bank of frames with its heat maps, and videos on which SAM2Long's tree is tried.

SAM2Act: Fang et al. 2501.18564; SAM2Long: Ding et al. 2410.16268. `bank` reads and writes frames, `heatmaps` makes
maps finer, `blocks` is a task that needs memory, `occlusion` has videos in which what is followed is hidden.
"""

from workbench.mechanisms.remembering.bank import MemoryBank, frame_weights
from workbench.mechanisms.remembering.blocks import ARMS, Episodes, Mover, draw_episodes, solved, train
from workbench.mechanisms.remembering.heatmaps import ConvexUp
from workbench.mechanisms.remembering.occlusion import TRACKERS, Hidden, draw_video, follow

__all__ = ["ARMS", "TRACKERS", "ConvexUp", "Episodes", "Hidden", "MemoryBank", "Mover", "draw_episodes", "draw_video",
           "follow", "frame_weights", "solved", "train"]  # fmt: skip
