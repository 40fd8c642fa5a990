"""The axes of a kernel call where no value tells: by sizes, and by the order that most models have."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from workbench.hooks.proofs.axes import Axes


def usual_axes(shape: Sequence[int], mixed: Sequence[int], width: int, heads: int | None) -> Axes | None:
    """The axes that most models have, to be proved afterwards: [batch, head, query, width], or with the first two as
    one; None for other shapes.
    """
    last = len(shape) - 1
    axes = {axis % len(shape) for axis in mixed}
    if width % len(shape) != last or axes not in ({last - 1}, {1, last - 1}):  # heads may share their values
        return None
    if len(shape) == 4:
        return Axes.plain("bhqd", shape[1])
    if len(shape) == 3 and heads and shape[0] % heads == 0:
        return Axes.parse("(batch head) query width", heads)
    return None


def axes_by_size(
    shape: Sequence[int], mixed: Sequence[int], width: int, heads: int | None, examples: int | None
) -> Axes | None:
    """The axes where only sizes can tell: the one assignment with the heads that the module states; None if several.

    Args:
        shape: of the kernel's output. mixed, width: as in `prove_axes`.
        heads: how many the module says it has. examples: how many the model was given.
    """
    free = [i for i in range(len(shape)) if i not in [m % len(shape) for m in mixed] and i != width % len(shape)]
    queries = [m % len(shape) for m in mixed]
    if len(queries) != 1 or len(free) > 2 or (heads is None and examples is None):
        return None
    fitting = []
    for roles in permutations(("b", "h"), len(free)):
        sizes = {role: shape[axis] for role, axis in zip(roles, free, strict=True)}
        stated = roles == ("b", "h")[: len(free)] if heads is None else sizes.get("h", 1) == heads
        if stated and examples in (None, sizes.get("b", 1)):  # the order of windows and examples is in no size
            fitting.append((roles, sizes))
    if heads is None and len(free) == 2 and shape[free[0]] == shape[free[1]] > 1:
        return None
    if len(fitting) > 1 and any(n > 1 for sizes in fitting for n in sizes[1].values()):
        return None
    if not fitting:
        return None
    roles, sizes = fitting[0]
    letters = ["?"] * len(shape)
    for role, axis in zip(roles, free, strict=True):
        letters[axis] = role
    letters[queries[0]], letters[width % len(shape)] = "q", "d"
    return Axes.plain("".join(letters), sizes.get("h", 1))
