"""Agent S2's mixture of grounding: which expert finds what an action names, and where on a screen that is.

After 2504.00906. The expert follows from the action alone; experts are in `workbench.mechanisms.screens`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import WorkbenchError, nearest

Point = tuple[float, float]
EXPERTS = ("visual", "textual", "structural", "none")
"""A model that points at a description, words that were read on the screen, cells of a sheet; or no place is needed."""
ROUTES = {
    **dict.fromkeys(("click", "type", "scroll", "drag_and_drop"), "visual"),
    "highlight_text_span": "textual",
    "set_cell_values": "structural",
    **dict.fromkeys(
        ("open", "switch_applications", "hotkey", "hold_and_press", "wait", "save_to_knowledge", "done", "fail"), "none"
    ),
}
"""The expert of each action of a worker."""


def route(actions: Sequence[str]) -> Tensor:
    """[step, expert] one-hot: which expert each action goes to, in the order of `EXPERTS`.

    Raises:
        WorkbenchError: an action that there is not.

    >>> route(["click", "wait"]).tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    """
    found = torch.zeros(len(actions), len(EXPERTS))
    for step, action in enumerate(actions):
        if action not in ROUTES:
            raise WorkbenchError(f"there is no action {action!r}", hint=nearest(action, list(ROUTES), "action"))
        found[step, EXPERTS.index(ROUTES[action])] = 1
    return found


def rescale(point: Point, size: Point, screen: Point) -> Point:
    """A point of the picture that a model was shown, on the screen.

    Args:
        size, screen: width and height of the picture and of the screen, in pixels.

    Raises:
        WorkbenchError: a picture or a screen without width or height, or a point outside of the picture.

    >>> rescale((500, 250), (1000, 1000), (1920, 1080))
    (960.0, 270.0)
    """
    if min(*size, *screen) <= 0:
        raise WorkbenchError(f"a picture of {size} and a screen of {screen} pixels: neither may be empty")
    if not all(0 <= at <= most for at, most in zip(point, size, strict=True)):
        raise WorkbenchError(f"the point {point} lies outside of a picture of {size} pixels")
    return point[0] * screen[0] / size[0], point[1] * screen[1] / size[1]
