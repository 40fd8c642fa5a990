"""Generated screens, and ways to find on them what is asked for: V2P's pointer, and Agent S2's mixture of experts.

V2P: Chen et al. 2508.13634; Agent S2: Agashe et al. 2504.00906. `drawing` has the screens, `pointer` the models that
point, `experts` three experts with a router, `study` what they are measured by.
"""

from workbench.mechanisms.screens.drawing import Screens, draw_screens
from workbench.mechanisms.screens.pointer import ARMS, Boxes, Pointer, train

__all__ = ["ARMS", "Boxes", "Pointer", "Screens", "draw_screens", "train"]
