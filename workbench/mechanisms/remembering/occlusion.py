"""Videos in which what is followed is hidden for a while, beside others that look like it, and a tracker with a memory.

Nothing is learnt: things are points with features that drift, and the tracker compares what it sees with the features
of the masks that it remembers. What it is tried with is SAM2Long's choice of memories: which are kept, and which of
several histories is believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor

from workbench.analysis.memory import MemoryTree, Node, Seen, grow_memory_tree, memory_frames

FRAMES, THINGS, FEATURES = 30, 3, 8
_DRIFT = 0.16  # of features, each frame
_ALIKE = 0.75  # of the features that others share with what is followed
_NOISE = 0.28  # of features, as they are seen
_REACH = 0.14  # of the picture: how far a thing is thought to go in a frame
TRACKERS = {
    "greedy": "the best mask of every frame, and a memory of the newest frames",
    "greedy, good frames": "the best mask of every frame, and a memory of frames on which it was likely good",
    "tree": "three pathways, and a memory of frames on which the mask was likely good",
}


@dataclass(frozen=True)
class Hidden:
    """A video.

    Attributes:
        places: [frame, thing, 2] from 0 to 1; thing 0 is followed. seen: [frame, thing, feature] as they are seen, with
            noise. visible: [frame, thing].
    """

    places: Tensor
    seen: Tensor
    visible: Tensor


def draw_video(seed: int | torch.Generator = 0) -> Hidden:
    """Draw a video: three things wander, what is followed is hidden twice for 2 to 4 frames.

    >>> draw_video(0).visible[:, 0].sum() < 30
    tensor(True)
    """
    random = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    steps = 0.03 * randn(1, THINGS, 2) + 0.015 * randn(FRAMES, THINGS, 2)
    places = torch.rand(1, THINGS, 2, generator=random) + steps.cumsum(0)
    places = 1 - (places % 2 - 1).abs()  # they turn round at the border
    shared = randn(1, 1, FEATURES)
    kinds = _ALIKE * shared + (1 - _ALIKE**2) ** 0.5 * randn(1, THINGS, FEATURES)
    drift = _DRIFT * randn(FRAMES, THINGS, FEATURES).cumsum(0)
    seen = kinds + drift - drift[:1] + _NOISE * randn(FRAMES, THINGS, FEATURES)
    visible = torch.ones(FRAMES, THINGS, dtype=torch.bool)
    for start, end in ((4, 12), (14, 24)):
        first = int(torch.randint(start, end, (1,), generator=random))
        visible[first : first + int(torch.randint(2, 5, (1,), generator=random)), 0] = False
    return Hidden(places, torch.nn.functional.normalize(seen, dim=-1), visible)


def follow(video: Hidden, tracker: str) -> tuple[MemoryTree, float]:
    """The tree of a tracker on a video, and the share of frames with what is followed on which it has it.

    Frame 0 is the prompt. At each frame every visible thing is a mask, whose predicted overlap falls with how far its
    features are from the nearest ones that are remembered, and with how far it went.
    """
    paths, floor = (3 if tracker == "tree" else 1), (-1.0 if tracker == "greedy" else 0.3)
    there = -1e9 if tracker == "greedy" else 0.0

    def see(frame: int, history: tuple[Node, ...]) -> Seen:
        by_frame = {node.frame: node for node in history}
        kept = memory_frames(history, floor, there=there)
        known = torch.stack([video.seen[0, 0], *(video.seen[t + 1, by_frame[t].value] for t in kept)])
        last = next((node for node in reversed(history) if node.logit > 0), None)
        place = video.places[0, 0] if last is None else video.places[last.frame + 1, last.value]
        ago = frame + 1 if last is None else frame - last.frame
        things = video.visible[frame + 1].nonzero()[:, 0].tolist()
        alike = (video.seen[frame + 1, things] @ known.T).topk(min(3, len(known)), -1).values.mean(-1)
        far = (video.places[frame + 1, things] - place).norm(dim=-1) / (_REACH * ago**0.5)
        sure = 6 * (alike - 0.55) - 0.5 * far.square().clamp(max=6)
        overlaps = [1 / (1 + exp(-float(one))) for one in sure]
        return Seen(overlaps, 2.0 * float(sure.max()), things)

    values: list[int] = []

    def track(frame: int, history: tuple[Node, ...]) -> Seen:
        seen = see(frame, history)
        values.extend(seen.masks)
        return seen

    tree = grow_memory_tree(track, FRAMES - 1, paths=paths, sure=2.0)
    there_is = video.visible[1:, 0].tolist()
    right = [values[i] == 0 for i, here in zip(tree.best, there_is, strict=True) if here]
    return tree, sum(right) / len(right)
