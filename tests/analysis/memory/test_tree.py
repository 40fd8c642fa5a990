"""The memory tree against brute force, the greedy tracker, and a trap."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import log
from pathlib import Path

import pytest
import torch

from workbench.analysis.memory import MemoryTree, Node, Seen, grow_memory_tree, key_factors, memory_frames
from workbench.errors import FormatError, WorkbenchError


def tracker(seed: int, logit: float = 5.0) -> Callable[[int, tuple[Node, ...]], Seen]:
    """Overlaps of three masks that depend on the whole history, the same at every call."""

    def track(frame: int, history: tuple[Node, ...]) -> Seen:
        mine = hash((seed, frame, *(node.mask for node in history))) % 2**31
        drawn = torch.rand(3, generator=torch.Generator().manual_seed(mine), dtype=torch.float64)
        return Seen(drawn.tolist(), logit)

    return track


def exhaustive(track: Callable[[int, tuple[Node, ...]], Seen], n: int) -> float:
    """The best score of all histories."""
    first = track(0, ())
    begun = max(range(3), key=lambda j: first.overlaps[j])
    best = -1e9
    for later in product(range(3), repeat=n - 1):
        history = (Node(0, 0, -1, begun, 0, 0, 0, 0, True),)
        score = 0.0
        for frame, mask in enumerate(later, 1):
            overlap = track(frame, history).overlaps[mask]
            score += log(overlap + 1e-5)
            history = (*history, Node(frame, 0, 0, mask, overlap, 0, score, 0, True))
        best = max(best, score)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_with_a_pathway_for_each_history_the_best_of_all_is_found(seed: int) -> None:
    track = tracker(seed)
    tree = grow_memory_tree(track, 5, paths=3**4, distinct=True)
    assert tree.scores[tree.best[-1]] == pytest.approx(exhaustive(track, 5))


@pytest.mark.parametrize("seed", range(6))
def test_one_pathway_is_the_greedy_tracker(seed: int) -> None:
    track = tracker(seed)
    tree = grow_memory_tree(track, 6, paths=1)
    history: tuple[Node, ...] = ()
    for frame in range(6):
        seen = track(frame, history)
        mask = max(range(3), key=lambda j: seen.overlaps[j])
        history = (*history, Node(frame, 0, 0, mask, seen.overlaps[mask], 5.0, 0, 0, True))
    assert [tree.masks[i] for i in tree.best] == [node.mask for node in history]


@pytest.mark.parametrize("seed", range(4))
def test_certain_frames_keep_the_best_scores_of_all_masks(seed: int) -> None:
    tree = grow_memory_tree(tracker(seed), 6, paths=3, distinct=True)
    for frame in range(1, 6):
        offered = [i for i, f in enumerate(tree.frames) if f == frame]
        wanted = sorted(offered, key=lambda i: -tree.scores[i])[:3]
        assert [i for i in sorted(offered, key=lambda i: tree.kept[i]) if tree.kept[i] >= 0] == wanted


def test_pathways_stay_the_same_for_as_long_as_frames_are_certain() -> None:
    tree = grow_memory_tree(tracker(1), 5, paths=3)
    ends = [i for i, f in enumerate(tree.frames) if f == 4 and tree.kept[i] >= 0]
    assert len(ends) == 3
    assert len({tuple(tree.masks[i] for i in tree.history(end)) for end in ends}) == 1
    unsure = grow_memory_tree(tracker(1, logit=0.5), 5, paths=3)
    ends = [i for i, f in enumerate(unsure.frames) if f == 4 and unsure.kept[i] >= 0]
    assert len({tuple(unsure.masks[i] for i in unsure.history(end)) for end in ends}) == 3


def test_the_trap() -> None:
    """Mask A looks better and leads nowhere: 0.9 then 0.2; mask B 0.8 then 0.9."""

    def track(frame: int, history: tuple[Node, ...]) -> Seen:
        if frame == 0:
            return Seen([1.0], 0.0)
        if frame == 1:
            return Seen([0.9, 0.8], 0.0)
        return Seen([0.2 if history[-1].mask == 0 else 0.9], 0.0)

    greedy, tree = (grow_memory_tree(track, 3, paths=n) for n in (1, 2))
    assert [greedy.masks[i] for i in greedy.best] == [0, 0, 0]
    assert greedy.scores[greedy.best[-1]] == pytest.approx(log(0.18), abs=1e-4)
    assert [tree.masks[i] for i in tree.best] == [0, 1, 0]
    assert tree.scores[tree.best[-1]] == pytest.approx(log(0.72), abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_unsure_frames_keep_no_two_of_a_kind_unless_they_have_to(seed: int) -> None:
    tree = grow_memory_tree(tracker(seed, logit=-1.0), 6, paths=3)
    assert not any(tree.certain)
    for frame in range(1, 6):
        kinds = [(round(tree.overlaps[i], 2), tree.logits[i] > 0) for i, f in enumerate(tree.frames)
                 if f == frame and tree.kept[i] >= 0]  # fmt: skip
        offered = {(round(tree.overlaps[i], 2), tree.logits[i] > 0) for i, f in enumerate(tree.frames) if f == frame}
        assert len(set(kinds)) == min(3, len(offered))
    few = grow_memory_tree(lambda frame, history: Seen([0.5, 0.5], 0.0), 4, paths=3)
    assert sum(k >= 0 for k, f in zip(few.kept, few.frames, strict=True) if f == 3) == 1 + 2  # one of each pathway


def test_scores_are_those_of_the_path_and_parents_lead_back(tmp_path: Path) -> None:
    tree = grow_memory_tree(tracker(3, logit=0.2), 7)
    for end in range(len(tree.frames)):
        path = tree.history(end)
        assert [tree.frames[i] for i in path] == list(range(tree.frames[end] + 1))
        assert tree.scores[end] == pytest.approx(sum(log(tree.overlaps[i] + 1e-5) for i in path[1:]))
    again = MemoryTree.load(tree.save(tmp_path / "tree"))
    assert again.table.equals(tree.table)
    assert again.table["believed"].sum() == 7


def test_frames_without_the_object_are_not_remembered() -> None:
    def node(frame: int, overlap: float, logit: float) -> Node:
        return Node(frame, frame, frame - 1, 0, overlap, logit, 0.0, 0, True)

    gone = [node(i, 0.9, -2.0) for i in range(6)]
    assert memory_frames(gone) == (5,)
    mixed = [node(i, 0.9 if i % 2 else 0.05, 3.0) for i in range(20)]
    assert memory_frames(mixed) == (19, 17, 15, 13, 11, 9)
    assert memory_frames([*mixed, node(20, 0.01, 3.0)]) == (20, 19, 17, 15, 13, 11)
    assert memory_frames(mixed, floor=-1) == (19, 18, 17, 16, 15, 14)
    assert memory_frames(()) == ()


def test_keys_grow_with_what_is_seen_of_the_object() -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0))
    factors = key_factors(logits.tolist())
    assert (factors[logits.argsort()].diff() > 0).all()
    assert float(factors.mean()) == pytest.approx(1, abs=1e-6)
    assert (float(factors.min()), float(factors.max())) == pytest.approx((0.95, 1.05))
    assert key_factors([4.0]).tolist() == [1.0]


@pytest.mark.parametrize("seen", [Seen([], 1.0), Seen([1.2], 1.0), Seen([0.5], float("nan"))])
def test_what_is_no_prediction_is_refused(seen: Seen) -> None:
    with pytest.raises(WorkbenchError, match="at frame 0 the tracker predicts"):
        grow_memory_tree(lambda frame, history: seen, 3)
    with pytest.raises(WorkbenchError, match="make no tree"):
        grow_memory_tree(lambda frame, history: Seen([0.5], 1.0), 0)


def test_a_file_without_a_best_pathway_and_masks_that_do_not_match_are_refused(tmp_path: Path) -> None:
    made = grow_memory_tree(tracker(0), 3)
    path = replace(made, kept=(-1,) * len(made.kept)).save(tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="the best"):
        MemoryTree.load(path)
    with pytest.raises(WorkbenchError, match="2 overlaps of 1 masks"):
        grow_memory_tree(lambda frame, history: Seen([0.5, 0.6], 3.0, ["a"]), 3)
