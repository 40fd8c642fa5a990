"""The axes of a kernel call by value: where its output lies in the input of the output projection.

What lies among the features of one row are heads, what lies among the rows are examples, windows and queries: queries
are what the values do not have. Where the width lies among the rows, the softmax runs over features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from workbench.hooks.proofs.axes import ROLES, Axes, Part, Role
from workbench.hooks.proofs.placements import Placement, placements


@dataclass(frozen=True)
class Proof:
    """What the values say of a call's axes.

    Attributes:
        axes: what they are, or None.
        reason: why they are not known; "" if they are.
        gate: each row has values of its own: a softmax that weighs experts or branches, no attention.
        within: axes that the values do not have which lie among the features of one row: heads, or queries where a
            model flattens these, so that heads among the rows look like examples.
    """

    axes: Axes | None
    reason: str = ""
    gate: bool = False
    within: frozenset[int] = frozenset()


def prove_axes(z: Tensor, p: Tensor, mixed: Sequence[int], width: int = -1) -> Proof | None:
    """What the axes of a kernel's output are, from where it lies in the input of a projection.

    Args:
        z: the kernel's output, with any axes.
        p: [..., feature], the input of the projection, as many elements.
        mixed: the axes of z that the values do not have: queries, and heads that share their values.
        width: the axis that only the values have.

    Returns:
        None if p is not z in another order.
    """
    found = placements(z, p, most=4)
    if found is None:
        return Proof(None, "nearly all of what the kernel gave is equal")
    if not found:
        return None
    read = {_read(placement, tuple(z.shape), tuple(p.shape), mixed, width % z.dim()) for placement in found}
    if len(read) == 1:
        return read.pop()
    listed = " or ".join(sorted(str(one.axes) for one in read if one.axes is not None))
    return Proof(None, f"the values fit several layouts: {listed}")


def _read(
    placement: Placement, shape: tuple[int, ...], into: tuple[int, ...], mixed: Sequence[int], width: int
) -> Proof:
    """The roles of a placement's factors, each cut where the rows of the projection's input `into` end."""
    features = into[-1]
    pieces: list[tuple[int, int, int]] = []  # axis, size, stride
    for axis, size, stride in placement.factors:
        inside = min(size, features // stride) if stride < features else 1
        if size % inside or (1 < inside < size and stride * inside != features):
            return Proof(None, "what the kernel gave lies across the rows of the projection")
        pieces += [(axis, n, s) for n, s in ((size // inside, stride * inside), (inside, stride)) if n > 1]
    mixed = [axis % len(shape) for axis in mixed]
    if not mixed:
        return Proof(None, "each row has values of its own, as where a softmax weighs experts", gate=True)
    features_mixed = any(axis == width and stride >= features for axis, _, stride in pieces)
    alone = len(mixed) == 1
    sides = {stride < features for axis, _, stride in pieces if axis in mixed}
    merged = alone and not features_mixed and len(sides) == 2  # heads that share their values, in one axis with queries

    def role(axis: int, stride: int) -> Role:
        if axis == width:
            return "width"
        if axis in mixed:
            return "query" if (alone and not merged) or features_mixed or stride >= features else "head"
        return "head" if stride < features else "batch"

    roles = [(axis, Part(role(axis, stride), size), stride) for axis, size, stride in pieces]
    among_features = frozenset(
        axis for axis, _, stride in roles if axis in mixed and stride < features and not features_mixed
    )
    among_rows = {axis for axis, _, stride in roles if axis in mixed and stride >= features}
    if not alone and among_features & among_rows:
        return Proof(None, "queries lie among the features of the projection, where they cannot be told from heads")
    with_queries = {_axis_of(stride, into) for _, part, stride in roles if part.role == "query"}

    def place(part: Part, stride: int) -> tuple[int, bool, int]:
        """Windows come after examples: their rows stand among those of the queries."""
        window = part.role == "batch" and _axis_of(stride, into) in with_queries
        return ROLES.index(part.role), window, -stride

    parts: list[list[tuple[Part, int]]] = [[] for _ in shape]
    for axis, part, stride in roles:
        before = parts[axis][-1] if parts[axis] else None
        kept = part.role in ("query", "width")  # in the kernel's own order, which is that of its keys and masks
        if before and before[0].role == part.role and (kept or place(*before) < place(part, stride)):
            parts[axis][-1] = Part(part.role, (before[0].size or 1) * (part.size or 1)), before[1]
        else:
            parts[axis].append((part, stride))
    _name_ones(parts, shape, mixed, width)
    opened = tuple(tuple(_opened(axis)) for axis in parts)
    flat = [(part, stride) for axis in parts for part, stride in axis]
    if not any(part.role == "query" for part, _ in flat):
        return Proof(None, "no axis of the call runs along the rows of the projection alone")
    order = sorted(range(len(flat)), key=lambda i: place(*flat[i]))
    return Proof(Axes(opened, tuple(order), "features" if features_mixed else "positions"), within=among_features)


def _axis_of(stride: int, into: tuple[int, ...]) -> int:
    """Which axis of a contiguous tensor a stride runs along."""
    own = 1
    for axis in range(len(into) - 1, -1, -1):
        own *= into[axis]
        if stride < own:
            return axis
    return 0


def _opened(axis: list[tuple[Part, int]]) -> list[Part]:
    """Parts without the size that changes from call to call; an axis with several such parts keeps all sizes."""
    alone = sum(part.role != "head" for part, _ in axis) == 1
    return [Part(part.role, None) if alone and part.role != "head" else part for part, _ in axis]


def _name_ones(parts: list[list[tuple[Part, int]]], shape: Sequence[int], mixed: Sequence[int], width: int) -> None:
    """Axes of a single index, of which no value tells: the values' axis is the width, then examples, then heads."""
    for axis, n in enumerate(shape):
        if n > 1:
            continue
        have = {part.role for several in parts for part, _ in several}
        if axis == width:
            chosen: Role = "width"
        elif axis in mixed:
            chosen = "head" if "query" in have else "query"
        else:
            chosen = "batch" if "batch" not in have or "head" in have else "head"
        parts[axis] = [(Part(chosen, 1), 0)]
