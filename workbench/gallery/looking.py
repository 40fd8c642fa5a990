"""Figures of papers that look and remember: V2P, Agent S2's grounding, SAM2Act's memory and SAM2Long's tree."""

from __future__ import annotations

import torch

from workbench.analysis.grounding.clicks import FACTOR, click_labels
from workbench.mechanisms.remembering import draw_episodes, draw_video, follow
from workbench.mechanisms.screens import draw_screens
from workbench.mechanisms.screens.drawing import PATCH, ROWS
from workbench.mechanisms.screens.experts import EXPERTS, by_action
from workbench.mechanisms.screens.pointer import EVEN, PATCHES
from workbench.mechanisms.studies import Exhibit, Heat
from workbench.views import View, all_of

_SEEN = 4  # the video that is shown, by its seed


def v2p() -> list[View]:
    """A screen, and the labels that a pointer is taught there."""
    drawn = draw_screens(8, 2)
    area = (drawn.boxes[:, 0, 2:] - drawn.boxes[:, 0, :2]).prod(-1)
    i = int(area.argmax())
    box = drawn.boxes[i, 0]
    left, top, right, bottom = (int(edge) for edge in box.tolist())
    panels = [
        Heat(name, click_labels(box, PATCHES, factor).view(ROWS, ROWS))
        for name, factor in (("a peak in the middle", FACTOR), ("even over the target", EVEN))
    ]
    grey = (drawn.pixels[i].mean(0) + 1) / 2
    shown = Heat("screen", grey.clamp(0, 1), boxes=[(top, left, bottom - top, right - left)])
    return all_of(
        Exhibit(
            "What a pointer is taught",
            f"A generated screen, its target outlined, and labels of its {ROWS} x {ROWS} patches of {PATCH} pixels: "
            "the share of a Gaussian as wide as the target in each patch, and the share of the target's area.",
            (shown, *panels),
        )
    )


def mixture() -> list[View]:
    """Which expert is asked, by what a request says."""
    known = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    known = known[(known[:, :2].sum(1) > 0) & (known[:, 1] >= known[:, 2])]
    rows = torch.nn.functional.one_hot(by_action(known), len(EXPERTS)).double()
    named = ("kind and colour", "name", "in the tree")
    texts = [", ".join(name for name, there in zip(named, row, strict=True) if there) for row in known.tolist()]
    heat = Heat("routed by what is said", rows, "request", "expert", texts, EXPERTS)
    about = "Each kind of request goes to one expert: what is in the tree of elements is looked up there."
    return all_of(Exhibit("Which expert is asked", about, (heat,)))


def sam2act() -> list[View]:
    """An episode: the last picture does not show where the block was."""
    drawn = draw_episodes(1, 3)
    panels = []
    for t, name in enumerate(("take the block", "press the button", "put it back")):
        x, y = (int(at) for at in drawn.goals[0, t].tolist())
        panels.append(Heat(name, drawn.frames[0, t].sum(0).clamp(min=0), boxes=[(y - 2, x - 2, 4, 4)]))
    about = (
        "Three key frames of the toy, the place to go to outlined. The third picture does not tell it: pads are alike."
    )
    return all_of(Exhibit("Put the block back", about, tuple(panels)))


def sam2long() -> list[View]:
    """The tree on a video in which what is followed is hidden twice."""
    return all_of(follow(draw_video(_SEEN), "tree")[0])
