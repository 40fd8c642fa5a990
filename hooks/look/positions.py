"""Where the token positions of a module's inputs are, how one of them is changed, and what that moves."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from workbench.hooks.look.replay import ModuleCall, mapped, spread_of, tensors

Which = Literal["this", "others", "first"]

ROUNDING = 64
"""Units in the last place of the largest number that do not count as a change."""


def positions_of(call: ModuleCall, batch: int) -> list[tuple[int, int]]:
    """(axis, length) of the positions of a call's inputs, once for each length: sequences of another length are others.

    Ids are [batch, position]; features are the last axis, or after the batch where a convolution reads the input; where
    nothing inside tells, positions are as many as around the module. Of images, all axes that a module knows from its
    features are given: it may mix along one of them only.
    """
    spots: dict[int, int] = {}
    around = [n for _, n in positions_of(call.outer, batch)[:1]] if call.outer else []
    given = list(tensors([call.args, call.kwargs]))
    width = given[0].shape[1 if call.features == 1 else -1] if given and given[0].dim() >= 3 else None
    for t in given:
        axis = _axis(t, call.features, batch, around)
        if axis is None or t.shape[axis] < 2 or (t is not given[0] and t.shape[axis] == width):
            continue  # a state [batch, feature, ...] has as many rows as there are features
        spots.setdefault(t.shape[axis], axis)
    found = [(axis, n) for n, axis in spots.items()]
    if given and call.features is not None and given[0].is_floating_point() and not _is_mask(given[0]):
        shape = given[0].shape
        found += [(axis, shape[axis]) for axis in _along(given[0], call.features)
                  if shape[axis] > 1 and (axis, shape[axis]) not in found]  # fmt: skip
    return found


def _along(t: Tensor, features: int | None) -> range:
    """The axes of positions of an image or a clip; none of a sequence."""
    return range(0) if t.dim() < 4 else range(2, t.dim()) if features == 1 else range(1, t.dim() - 1)


def _axis(t: Tensor, features: int | None, batch: int, around: list[int]) -> int | None:
    if t.dim() == 2 and t.dtype == torch.long:
        return 1 if t.shape[0] == batch else None
    if not t.is_floating_point() or t.dim() < 2 or _is_mask(t):
        return None
    if t.dim() == 2:
        return 0 if t.shape[0] > batch else None
    if t.dim() == 3 and t.shape[1] == batch != t.shape[0]:
        return 0  # positions first
    if t.dim() == 3 and features is None and [n in around for n in t.shape].count(True) == 1:
        return [n in around for n in t.shape].index(True)
    return t.dim() - (1 if features == 1 else 2)


def moved(call: ModuleCall, axis: int, length: int, j: int, *, point: bool = False, which: Which = "this") -> Any:
    """A call's (args, kwargs) with position j of every tensor of that length changed; ids are swapped for others.

    Args:
        point: of images one position in the middle of the other axes, instead of a whole row.
        which: "others": all positions but j are changed; "first": only those of the first tensor of that length, and
            of all that are equal to it.
    """
    first = next(iter(_of_length(call, axis, length)), None) if which == "first" else None
    others = which == "others"

    def one(t: Tensor) -> Tensor:
        if t.dim() <= axis or t.shape[axis] != length or _is_mask(t):
            return t
        if first is not None and not _same(t, first):
            return t
        before, t, noise = t, t.clone(), torch.Generator().manual_seed(j)
        part = t if others else t.select(axis, j)
        for other in reversed(_along(t, call.features)) if point else ():
            if other != axis:
                middle = t.shape[other] // 2
                part = part.narrow(other - (other > axis), middle, 1)
        if t.is_floating_point():
            part += (torch.randn(part.shape, generator=noise).to(t.device) * spread_of(t)).to(t.dtype)
        elif t.dtype == torch.long and t.dim() == 2 and not _counts_or_marks(t):
            part.copy_(before.flatten()[(part * 7 + 3) % t.numel()])
        if others:
            t.select(axis, j).copy_(before.select(axis, j))
        return t

    return mapped(one, (call.args, call.kwargs))


def several_inputs(call: ModuleCall, axis: int, length: int) -> bool:
    """Whether a call has features of several sequences of that length, which differ."""
    found = _of_length(call, axis, length)
    return any(not _same(one, found[0]) for one in found[1:])


def _of_length(call: ModuleCall, axis: int, length: int) -> list[Tensor]:
    return [
        t
        for t in tensors([call.args, call.kwargs])
        if t.is_floating_point() and t.dim() > axis and t.shape[axis] == length and not _is_mask(t)
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _counts_or_marks(ids: Tensor) -> bool:
    """Whether integers are a list of positions, or a mask, rather than ids of tokens."""
    return not bool(ids[0].diff().ne(1).any()) or ids.unique().numel() <= 2


def _is_mask(t: Tensor) -> bool:
    """An additive mask; square images have its shape, but not its values."""
    return t.dim() == 4 and t.is_floating_point() and bool(((t == 0) | (t < -1e4)).all())


def speaking(call: ModuleCall, length: int, batch: int) -> int | None:
    """Number of the first tensor of an output that has positions; others are weights, caches, logits of routers."""
    for i, t in enumerate(tensors(call.output)):
        flat = t.dim() == 2 and t.shape[0] == length * batch
        beside = t.dim() == 4 or (t.dim() == 3 and i > 0)  # weights of heads, or their mean beside what they give
        of_keys = beside and t.shape[-1] == length and length not in t.shape[:-1]  # which are elsewhere
        weights = of_keys and call.features != 1  # else it is an image
        if t.is_floating_point() and t.dim() >= 2 and (length in t.shape or flat) and not weights:
            return i
    return None


def reach(before: Any, after: Any, which: int, length: int, batch: int, j: int) -> tuple[int, ...] | None:
    """Which positions of an output differ, along the axis where the fewest do; None: the output has changed its shape.

    Rounding does not count.
    """
    if len(list(tensors(after))) <= which:
        return None
    a, b = (list(tensors(x))[which] for x in (before, after))
    if a.shape != b.shape:
        return None
    a, b = a.double().nan_to_num(posinf=0, neginf=0), b.double().nan_to_num(posinf=0, neginf=0)
    eps = torch.finfo(list(tensors(before))[which].dtype).eps
    change = (a - b).abs() > ROUNDING * eps * a.abs().max()
    ways = []
    for axis, size in enumerate(change.shape):
        at = change.movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
        if size == length:
            ways.append(at)
        elif axis == 0 and change.dim() == 2 and size == length * batch:
            ways += [at % length, at // batch]
    found = [tuple(sorted(set(at.tolist()))) for at in ways]
    return min(found, key=lambda at: (len(set(at) - {j}), len(at)), default=())
