"""What pointers and experts are measured by, on screens that no training has seen."""

from __future__ import annotations

from typing import Any

import torch

from workbench.analysis.grounding.clicks import click_labels
from workbench.mechanisms.screens.drawing import draw_screens
from workbench.mechanisms.screens.experts import (
    EXPERTS,
    answer,
    by_action,
    fit_router,
    marked,
    marks,
    phrases,
    request,
    right,
)
from workbench.mechanisms.screens.pointer import EVEN, PATCHES, clicks

SIZES = {"small": (0, 60), "middle": (60, 180), "large": (180, 1e9)}
"""Areas in pixels, each from above the first to the second."""
_HELD_OUT = 900_001


def pointed(model: Any, n: int = 1000) -> dict[str, float]:
    """Share of clicks in the box, over all and by size; of a pointer, the weight off the target too, and on what."""
    drawn = draw_screens(n, _HELD_OUT)
    points, weights = clicks(model, drawn)
    box = drawn.boxes[:, 0]
    hits = ((points >= box[:, :2]) & (points <= box[:, 2:])).all(-1).float()
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    found = {"hits": float(hits.mean())}
    found |= {f"hits, {name}": float(hits[(area > low) & (area <= high)].mean()) for name, (low, high) in SIZES.items()}
    if weights is not None:
        on = torch.stack([torch.stack([click_labels(one, PATCHES, EVEN) > 0 for one in each]) for each in drawn.boxes])
        target, others = on[:, 0], on[:, 1:].any(1) & ~on[:, 0]
        found["weight off the target"] = float((weights * ~target).sum(-1).mean())
        found["weight on other elements"] = float((weights * others).sum(-1).mean())
        found["weight on the desktop"] = float((weights * ~target * ~others).sum(-1).mean())
    return found


def mixed(pointer: Any, seed: int, n: int = 1000) -> dict[str, Any]:
    """Hits of each expert, of routers over them and of whoever is right; which is right where; who is asked how often.

    The trained router learns on other screens than those that are measured. Marks of text are right where both ends
    are, of the screens that have a text.
    """
    random = torch.Generator().manual_seed(_HELD_OUT + 1 + seed)
    learning, tested = (request(draw_screens(n, random), random) for _ in range(2))
    points, known = answer(pointer, learning, random)
    router = fit_router(known, right(points, learning.screens))
    points, known = answer(pointer, tested, random)
    hits = right(points, tested.screens)
    with torch.no_grad():
        learnt = router(known).argmax(1)
    rows = torch.arange(n)
    found: dict[str, Any] = {name: float(hits[:, k].float().mean()) for k, name in enumerate(EXPERTS)}
    found["routed by action"] = float(hits[rows, by_action(known)].float().mean())
    found["routed, trained"] = float(hits[rows, learnt].float().mean())
    found["anyone"] = float(hits.any(1).float().mean())
    which, there = phrases(tested.screens)
    for name, mark in zip(("textual", "visual"), marks(pointer, tested, which), strict=True):
        found[f"marks, {name}"] = float(marked(mark, tested.screens, which)[there].float().mean())
    cases = {"both": (True, True), "kind and colour": (True, False), "name": (False, True)}
    found["where"] = {
        case: [float(hits[(tested.described == a) & (tested.named == b), k].float().mean()) for k in range(3)]
        for case, (a, b) in cases.items()
    }
    found["asked"] = [float((learnt == k).float().mean()) for k in range(3)]
    return found
