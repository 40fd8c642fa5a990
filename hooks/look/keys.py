"""What the keys of an attention call are: positions, or something else that is read as if it were one.

A softmax over experts, slots or pooled positions looks like any other. One position of the module's input is changed:
where keys are positions, the values of one key change, or of a few neighbours; where each key sums up the whole input,
all change; where nothing changes, keys come from elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from workbench.hooks.look.positions import ROUNDING, moved, positions_of
from workbench.hooks.look.replay import ModuleCall, Replays

Over = Literal["positions", "pooled", "summaries", "elsewhere", "unknown"]


@dataclass(frozen=True)
class Keys:
    """What the keys of one kernel call are.

    Attributes:
        over: "positions"; "pooled": fewer than there are positions, each of a few; "summaries": each of all positions
            (slots, experts, linear attention); "elsewhere": not from what the module was given at all (learned keys);
            "unknown": nothing tells.
        moved: which keys changed with the position in the middle.
        mixed: a key changes with each of two neighbours: what it reads is several positions, in their own number.
    """

    over: Over
    moved: tuple[int, ...] = ()
    mixed: bool = False


def probe_keys(replays: Replays, call: ModuleCall) -> list[Keys]:
    """For each kernel call that a recorded module call made itself, in order, what its keys are."""
    spots = positions_of(call, replays.batch)
    if call.reads[0] == call.reads[1] or not (before := _values(replays, call, None)):
        return []
    seen: list[list[tuple[int, int, tuple[int, ...]]]] = [[] for _ in before]  # length, position, keys that moved
    mixed = [False] * len(before)
    for axis, length in spots:
        last: list[Tensor] = []  # by call, which keys of which entry of the batch moved with the position before
        for j in sorted({1, length // 2, min(length // 2 + 1, length - 1)}):
            after = _values(replays, call, (axis, length, j))
            if len(after) != len(before) or any(a.shape != b.shape for a, b in zip(after, before, strict=True)):
                continue
            now = [_changed(a, b) for a, b in zip(after, before, strict=True)]
            if j == length // 2 + 1 and last:
                mixed = [several or bool((a & b).any()) for several, a, b in zip(mixed, last, now, strict=True)]
            at = 0 if j > length // 2 else len(seen[0])  # that in the middle comes last
            for found, change in zip(seen, now, strict=True):
                found.insert(at, (length, j, tuple(change.any(0).nonzero().flatten().tolist())))
            last = now
    verdicts = [_verdict(found, v, replays.batch) for found, v in zip(seen, before, strict=True)]
    if any(one.over == "elsewhere" for one in verdicts):  # or a key stands for every third position, say
        for axis, length in spots:
            after = _values(replays, call, (axis, length, length // 2), others=True)
            for i, (a, b) in enumerate(zip(after, before, strict=False)):
                if verdicts[i].over == "elsewhere" and (a.shape != b.shape or bool(_changed(a, b).any())):
                    fewer = b.shape[0] * b.shape[2] < replays.batch * length
                    verdicts[i] = Keys("pooled" if fewer else "unknown")
    return [
        replace(one, mixed=several and one.over == "positions") for one, several in zip(verdicts, mixed, strict=True)
    ]


def _values(
    replays: Replays, call: ModuleCall, change: tuple[int, int, int] | None, *, others: bool = False
) -> list[Tensor]:
    """The values [batch, kv head, key, width] of each kernel call of the module's own."""
    with replays.watched() as calls:
        replays.run(call, None if change is None else moved(call, *change, point=not others, others=others))
        return [one.v.detach().clone() for one in calls if one.module is call.module and one.v.dim() == 4]


def _changed(a: Tensor, b: Tensor) -> Tensor:
    """[batch, key] which values differ by more than rounding."""
    eps = torch.finfo(a.dtype).eps
    change = (a.double() - b.double()).abs() > ROUNDING * eps * b.double().abs().max()
    return change.any(3).any(1)


def _verdict(found: list[tuple[int, int, tuple[int, ...]]], values: Tensor, batch: int) -> Keys:
    if not found:
        return Keys("unknown")
    keys, rows = values.shape[2], values.shape[0] * values.shape[2]
    telling = [one for one in found if one[2]]
    if not telling:
        return Keys("elsewhere")
    length, _, last = telling[-1]
    if keys == 1:
        return Keys("unknown", last)
    whole = [len(one[2]) == keys for one in found if one[0] == length]
    if len(whole) > 1 and (all(whole) or (any(whole) and keys > 3)):  # a softmax may leave a position almost out
        return Keys("summaries", last)
    return Keys("pooled" if rows < batch * length else "positions", last)
