"""What the keys of an attention call are: positions, or something else that is read as if it were one.

A softmax over experts, slots or pooled positions looks like any other. One position of the module's input is changed:
where keys are positions, the values of one key change, or of a few neighbours; where each key sums up the whole input,
all change; where nothing changes, keys come from elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from workbench.hooks.look.positions import ROUNDING, Which, moved, positions_of, several_inputs
from workbench.hooks.look.replay import ModuleCall, Replays
from workbench.hooks.tap import AttentionCall

Over = Literal["positions", "others", "moved", "pooled", "summaries", "elsewhere", "unknown"]


@dataclass(frozen=True)
class Keys:
    """What the keys of one kernel call are.

    Attributes:
        over: "positions"; "others": those of another sequence; "moved": positions that are not numbered as the queries
            are, as where keys are turned round; "pooled": fewer than there are positions, each of a few; "summaries":
            each of all positions (slots, experts, linear attention); "elsewhere": not from what the module was given
            at all (learned keys); "unknown": nothing tells.
        moved: which keys changed with the position in the middle.
        mixed: what a key reads is several positions, and not what is pooled into it: it changes with each of two
            neighbours, or, of pooled keys, one position changes several.
        number: how many there are.
    """

    over: Over
    moved: tuple[int, ...] = ()
    mixed: bool = False
    number: int = 0


def probe_keys(replays: Replays, call: ModuleCall) -> list[Keys]:
    """For each kernel call that a recorded module call made itself, in order, what its keys are."""
    spots = positions_of(call, replays.batch)
    if call.reads[0] == call.reads[1] or not (before := _calls(replays, call, None)):
        return []
    seen: list[list[_Probe]] = [[] for _ in before]
    mixed = [False] * len(before)
    for axis, length in spots:
        last: list[Tensor] = []  # by call, which keys of which entry of the batch moved with the position before
        for j in sorted({1, length // 2, min(length // 2 + 1, length - 1)}):
            after = _calls(replays, call, (axis, length, j))
            if len(after) != len(before) or any(a.v.shape != b.v.shape for a, b in zip(after, before, strict=True)):
                continue
            now = [_changed(a.v, b.v) for a, b in zip(after, before, strict=True)]
            if j == length // 2 + 1 and last:
                mixed = [several or bool((a & b).any()) for several, a, b in zip(mixed, last, now, strict=True)]
            at = 0 if j > length // 2 else len(seen[0])  # that in the middle comes last
            for found, change, a, b in zip(seen, now, after, before, strict=True):
                found.insert(at, _Probe(length, j, _along(change), _queries(a, b)))
            last = now
    verdicts = [_verdict(found, one.v, replays.batch) for found, one in zip(seen, before, strict=True)]
    if any(one.over == "elsewhere" for one in verdicts):  # or a key stands for every third position, say
        for axis, length in spots:
            after = _calls(replays, call, (axis, length, length // 2), which="others")
            for i, (a, b) in enumerate(zip(after, before, strict=False)):
                if verdicts[i].over == "elsewhere" and (a.v.shape != b.v.shape or bool(_changed(a.v, b.v).any())):
                    fewer = b.v.shape[0] * b.v.shape[2] < replays.batch * length
                    verdicts[i] = Keys("pooled" if fewer else "unknown")
    if len(spots) == 1:
        numbered = [_numbered(found, one, replays.batch) for found, one in zip(seen, before, strict=True)]
        others = _read_others(replays, call, before, *spots[0])
        for i, one in enumerate(verdicts):
            if one.over == "positions" and (others[i] or not numbered[i]):
                verdicts[i] = replace(one, over="others" if others[i] else "moved")
        several = [any(len(each.keys) > 1 for each in found) for found in seen]
        mixed = [many if one.over == "pooled" else own for one, many, own in zip(verdicts, several, mixed, strict=True)]
    told = ("positions", "others", "moved") + (("pooled",) if len(spots) == 1 else ())
    return [
        replace(one, mixed=own and one.over in told, number=b.v.shape[2])
        for one, own, b in zip(verdicts, mixed, before, strict=True)
    ]


class _Probe(NamedTuple):
    """One position of a length was changed: which keys moved, and which queries; None: they are not known."""

    length: int
    position: int
    keys: tuple[int, ...]
    queries: tuple[int, ...] | None


def _calls(
    replays: Replays, call: ModuleCall, change: tuple[int, int, int] | None, *, which: Which = "this"
) -> list[AttentionCall]:
    """Each kernel call of the module's own, whose values are [batch, kv head, key, width]."""
    with replays.watched() as calls:
        replays.run(call, None if change is None else moved(call, *change, point=which != "others", which=which))
        return [_copied(one) for one in calls if one.module is call.module and one.v.dim() == 4]


def _copied(call: AttentionCall) -> AttentionCall:
    q, k = (None if t is None or t.dim() != 4 else t.detach().clone() for t in (call.q, call.k))
    return replace(call, q=q, k=k, v=call.v.detach().clone())


def _along(change: Tensor) -> tuple[int, ...]:
    return tuple(change.any(0).nonzero().flatten().tolist())


def _queries(after: AttentionCall, before: AttentionCall) -> tuple[int, ...] | None:
    if after.q is None or before.q is None or after.q.shape != before.q.shape:
        return None
    return _along(_changed(after.q, before.q))


def _numbered(found: list[_Probe], call: AttentionCall, batch: int) -> bool:
    """Whether keys and queries follow each other as the positions do, as far as single ones have moved.

    Learned queries move with no position, though they differ.
    """
    n_keys = call.v.shape[2]
    if call.v.shape[0] != batch:
        return True
    if call.q is not None and all(one.queries == () for one in found) and not bool((call.q == call.q[:, :, :1]).all()):
        return False
    before: tuple[int, int] | None = None
    for length, j, keys, queries in found:
        if len(keys) != 1 or (queries is not None and len(queries) != 1):
            continue
        key, query = keys[0], j if queries is None else queries[0]
        if n_keys == length and (key != j or query != j):
            return False
        if before is not None and key - query != before[0] - before[1]:
            return False
        before = key, query
    return True


def _read_others(replays: Replays, call: ModuleCall, before: list[AttentionCall], axis: int, length: int) -> list[bool]:
    """Of each kernel call, whether its queries come from the first of several sequences of one length, its keys not."""
    if not several_inputs(call, axis, length):
        return [False] * len(before)
    after = _calls(replays, call, (axis, length, length // 2), which="first")
    if len(after) != len(before):
        return [False] * len(before)
    found = []
    for a, b in zip(after, before, strict=True):
        keys = any(
            x is not None and y is not None and (x.shape != y.shape or bool(_changed(x, y).any()))
            for x, y in ((a.k, b.k), (a.v, b.v))
        )
        found.append(not keys and a.q is not None and bool(_queries(a, b)))
    return found


def _changed(a: Tensor, b: Tensor) -> Tensor:
    """[batch, key] which values differ by more than rounding."""
    eps = torch.finfo(a.dtype).eps
    change = (a.double() - b.double()).abs() > ROUNDING * eps * b.double().abs().max()
    return change.any(3).any(1)


def _verdict(found: list[_Probe], values: Tensor, batch: int) -> Keys:
    if not found:
        return Keys("unknown")
    keys, rows = values.shape[2], values.shape[0] * values.shape[2]
    telling = [one for one in found if one.keys]
    if not telling:
        return Keys("elsewhere")
    length, last = telling[-1].length, telling[-1].keys
    if keys == 1:
        return Keys("unknown", last)
    whole = [len(one.keys) == keys for one in found if one.length == length]
    if len(whole) > 1 and (all(whole) or (any(whole) and keys > 3)):  # a softmax may leave a position almost out
        return Keys("summaries", last)
    return Keys("pooled" if rows < batch * length else "positions", last)
