"""The constrained memory tree of SAM2Long (Ding et al. 2024, arXiv 2410.16268): several histories of a video at once.

A tracker that believes its best mask of every frame cannot take back a mistake. Here several pathways go on side by
side, each with the memory of its own masks; at the end the one with the best score of all frames is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, log
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd

_LEAST = 1e-5  # is added to every predicted overlap before its logarithm
SPATIAL, POINTERS = 7, 16
"""Frames whose maps are read, the prompt's among them, and frames whose object pointers are."""


@dataclass(frozen=True)
class Seen:
    """What a tracker makes of a frame with the memory of one pathway.

    Attributes:
        overlaps: of each mask that it proposes, the overlap (IoU) that it predicts, from 0 to 1.
        logit: whether the object is there: above 0 if so.
        masks: what is kept of each mask, for the memory of later frames; any values.
    """

    overlaps: Sequence[float]
    logit: float
    masks: Sequence[Any] = ()


@dataclass(frozen=True)
class Node:
    """A mask of a frame, at the end of a history.

    Attributes:
        frame: its frame. place: its place among the tree's nodes. parent: that of the mask before it; −1 for none.
        mask: which of the proposed masks it is. overlap, logit: as the tracker said.
        score: the sum of ln(overlap + 1e-5) over its history, from the second frame behind the prompt on.
        kept: its rank among the pathways that went on from it; −1 where it was given up.
        certain: whether the object logits of its frame were sure.
        value: what the tracker keeps of it.
    """

    frame: int
    place: int
    parent: int
    mask: int
    overlap: float
    logit: float
    score: float
    kept: int
    certain: bool
    value: Any = None


@dataclass(frozen=True, repr=False)
class MemoryTree(Result):
    """All masks that were weighed, and which pathways went on.

    Attributes:
        frames, parents, masks, overlaps, logits, scores, kept, certain: of each node, as in `Node`; frame 0 is the
            first behind the prompt.
        paths: how many pathways went on at most.
    """

    form = "workbench.memory_tree"
    filled = ("node",)

    frames: Annotated[tuple[int, ...], "node"]
    parents: Annotated[tuple[int, ...], "node"]
    masks: Annotated[tuple[int, ...], "node"]
    overlaps: Annotated[tuple[float, ...], "node"]
    logits: Annotated[tuple[float, ...], "node"]
    scores: Annotated[tuple[float, ...], "node"]
    kept: Annotated[tuple[int, ...], "node"]
    certain: Annotated[tuple[bool, ...], "node"]
    paths: int
    provenance: dict[str, Any]

    def check_parts(self) -> None:
        """Parents stand before their children, one frame earlier."""
        for place, (frame, parent) in enumerate(zip(self.frames, self.parents, strict=True)):
            if parent >= place or parent < -1 or (parent == -1) != (frame == 0):
                raise WorkbenchError(f"node {place} of frame {frame} has the parent {parent}")
            if parent >= 0 and self.frames[parent] != frame - 1:
                raise WorkbenchError(f"node {place} of frame {frame} has a parent of frame {self.frames[parent]}")
        last = max(self.frames)
        if [k for f, k in zip(self.frames, self.kept, strict=True) if f == last].count(0) != 1:
            raise WorkbenchError(f"not one node of the last frame {last} is the best")

    def history(self, place: int) -> tuple[int, ...]:
        """The nodes from the first frame to this one."""
        found = [place]
        while self.parents[found[-1]] >= 0:
            found.append(self.parents[found[-1]])
        return tuple(found[::-1])

    @property
    def best(self) -> tuple[int, ...]:
        """The nodes of the pathway that is believed: the best score at the last frame."""
        last = max(self.frames)
        ends = [i for i, (f, k) in enumerate(zip(self.frames, self.kept, strict=True)) if f == last and k == 0]
        return self.history(ends[0])

    @property
    def table(self) -> pd.DataFrame:
        """One row per mask that was weighed."""
        import pandas as pd

        believed = set(self.best)
        return pd.DataFrame(
            {
                "frame": self.frames, "node": range(len(self.frames)), "parent": self.parents, "mask": self.masks,
                "overlap": self.overlaps, "logit": self.logits, "score": self.scores, "kept": self.kept,
                "certain": self.certain, "believed": [i in believed for i in range(len(self.frames))],
            }
        )  # fmt: skip

    def __repr__(self) -> str:
        best = self.best
        sure = len({f for f, c in zip(self.frames, self.certain, strict=True) if c})
        return (
            f"MemoryTree({max(self.frames) + 1} frames, {self.paths} pathways, {sure} frames certain; score "
            f"{self.scores[best[-1]]:.3f} by masks {[self.masks[i] for i in best[:8]]})"
        )


Track = Callable[[int, tuple[Node, ...]], Seen]


def grow_memory_tree(
    track: Track, n_frames: int, *, paths: int = 3, sure: float = 2.0, distinct: bool = False
) -> MemoryTree:
    """Follow several pathways through a video.

    At the first frame behind the prompt there is one history, and its best mask begins all pathways. Later each pathway
    gives a few masks; each has the score of its pathway plus ln(overlap + 1e-5). Where some |object logit| is above
    `sure`, the best go on. Where none is, the best go on of which no two have the same overlap to two decimals and the
    same sign of the logit; if those are too few, the best of pathways that are not among them follow.

    Args:
        track: given a frame (0 is the first behind the prompt) and a pathway's nodes so far, what a tracker with that
            memory makes of it; `memory_frames` says which of them it should remember.
        paths: pathways; 1 is the greedy tracker.
        distinct: whether pathways with the same history are one. As released they are not: as long as all frames are
            certain, all pathways stay what the first is.

    Raises:
        WorkbenchError: no frames or pathways, or a tracker that proposes nothing, or what is no overlap.
    """
    if n_frames < 1 or paths < 1 or not sure >= 0:
        raise WorkbenchError(f"{n_frames} frames, {paths} pathways and a bound of {sure} make no tree")
    nodes: list[Node] = []
    first = _checked(track(0, ()), 0)
    sure_now = abs(first.logit) > sure
    best = max(range(len(first.overlaps)), key=lambda j: first.overlaps[j])
    for j, overlap in enumerate(first.overlaps):
        rank = 0 if j == best else -1
        nodes.append(Node(0, j, -1, j, overlap, first.logit, 0.0, rank, sure_now, _value(first, j)))
    alive: list[tuple[Node, ...]] = [(nodes[best],)] * (1 if distinct else paths)
    for frame in range(1, n_frames):
        seen = [_checked(track(frame, history), frame) for history in alive]
        sure_now = max(abs(one.logit) for one in seen) > sure
        offers = [
            _Offer(p, j, alive[p][-1].score + log(overlap + _LEAST), overlap, one.logit)
            for p, one in enumerate(seen)
            for j, overlap in enumerate(one.overlaps)
        ]
        offers.sort(key=lambda offer: -offer.score)  # stable: of equals the first pathway's
        chosen = offers[:paths] if sure_now else _diverse(offers, paths)
        ranks = {(offer.path, offer.mask): rank for rank, offer in enumerate(chosen)}
        made: dict[int, Node] = {}
        for offer in sorted(offers, key=lambda offer: (offer.path, offer.mask)):
            parent, rank = alive[offer.path][-1], ranks.get((offer.path, offer.mask), -1)
            node = Node(frame, len(nodes), parent.place, offer.mask, offer.overlap, offer.logit, offer.score, rank,
                        sure_now, _value(seen[offer.path], offer.mask))  # fmt: skip
            nodes.append(node)
            if rank >= 0:
                made[rank] = node
        alive = [(*alive[chosen[rank].path], made[rank]) for rank in sorted(made)]
    return MemoryTree(
        frames=tuple(node.frame for node in nodes), parents=tuple(node.parent for node in nodes),
        masks=tuple(node.mask for node in nodes), overlaps=tuple(node.overlap for node in nodes),
        logits=tuple(node.logit for node in nodes), scores=tuple(node.score for node in nodes),
        kept=tuple(node.kept for node in nodes), certain=tuple(node.certain for node in nodes),
        paths=paths, provenance={"sure": sure, "distinct": distinct},
    )  # fmt: skip


@dataclass(frozen=True)
class _Offer:
    """A mask that a pathway may go on with."""

    path: int
    mask: int
    score: float
    overlap: float
    logit: float

    @property
    def kind(self) -> tuple[float, bool]:
        """Offers of one kind are not told apart."""
        return round(self.overlap, 2), self.logit > 0


def _checked(seen: Seen, frame: int) -> Seen:
    if not len(seen.overlaps) or any(not 0 <= one <= 1 for one in seen.overlaps) or not isfinite(seen.logit):
        raise WorkbenchError(
            f"at frame {frame} the tracker predicts overlaps {list(seen.overlaps)} and an object logit of {seen.logit}",
            hint="at least one mask, overlaps from 0 to 1, a finite logit",
        )
    if len(seen.masks) not in (0, len(seen.overlaps)):
        raise WorkbenchError(
            f"at frame {frame} the tracker gives {len(seen.overlaps)} overlaps of {len(seen.masks)} masks"
        )
    return seen


def _value(seen: Seen, mask: int) -> Any:
    return seen.masks[mask] if len(seen.masks) else None


def _diverse(offers: Sequence[_Offer], paths: int) -> list[_Offer]:
    """The best offers of which no two are of one kind; then the best of pathways that are not among them."""
    chosen: list[_Offer] = []
    for offer in offers:
        if len(chosen) < paths and offer.kind not in {one.kind for one in chosen}:
            chosen.append(offer)
    for offer in offers:
        if len(chosen) < paths and offer.path not in {one.path for one in chosen}:
            chosen.append(offer)
    return chosen


def memory_frames(
    history: Sequence[Node], floor: float = 0.1, *, spatial: int = SPATIAL, there: float = 0.0
) -> tuple[int, ...]:
    """Which frames a pathway remembers, the newest first; the prompt's, which is always read, is not among them.

    Frames on which the mask was likely good (an overlap above `floor`) and the object was there (a logit above
    `there`), at most `spatial` − 1 of them, and the last frame, whatever it was.

    >>> good = [Node(i, i, i - 1, 0, 0.9, 3.0, 0.0, 0, True) for i in range(4)]
    >>> memory_frames([*good[:2], Node(2, 2, 1, 0, 0.9, -1.0, 0.0, 0, True), good[3]], spatial=4)
    (3, 1, 0)
    """
    if not history:
        return ()
    valid = [node.frame for node in reversed(history) if node.overlap > floor and node.logit > there]
    last = history[-1].frame
    valid = valid if last in valid else [last, *valid]
    return tuple(valid[: max(1, spatial - 1)])


def key_factors(logits: Sequence[float], low: float = 0.95, high: float = 1.05) -> Tensor:
    """[frame] by what the keys of each remembered frame are multiplied: from `low` for the one on which the object is
    seen least to `high` for the one on which it is seen most, in even steps by rank. 1 where there is but one.

    >>> key_factors([2.0, -1.0, 10.0]).tolist()
    [1.0, 0.949..., 1.049...]
    """
    n = len(logits)
    if n < 2:
        return torch.ones(n)
    made = torch.empty(n)
    made[torch.tensor(logits).argsort(stable=True)] = torch.linspace(low, high, n)
    return made
