"""Which axis of a kernel call is batch, head and query.

A tap sees tensors; what their axes mean is shown by where the kernel's output turns up in the input of the output
projection. What lies among the features of one row are heads, what lies among the rows are examples, windows and
queries: queries are what the values do not have. Where the width lies among the rows, the softmax runs over features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from math import prod
from typing import Literal, NamedTuple

from torch import Tensor

from workbench.errors import CaptureError
from workbench.hooks.proofs.placements import Placement, placements

Role = Literal["batch", "head", "query", "width"]
_ROLES: tuple[Role, ...] = ("batch", "head", "query", "width")
_SPELLED: Mapping[str, Role] = {
    **{role: role for role in _ROLES},
    "window": "batch",
    "group": "head",
    "b": "batch",
    "w": "batch",
    "h": "head",
    "q": "query",
    "d": "width",
}
_TOKEN = re.compile(r"\(|\)|[a-z]+\d*(?:=\d+)?")


class Part(NamedTuple):
    """A factor of an axis: what it counts, and how many; None: whatever the other parts of the axis leave."""

    role: Role
    size: int | None


@dataclass(frozen=True)
class Axes:
    """What the axes of a kernel's output are made of.

    Attributes:
        parts: by axis, the outermost part first. Heads have a size, as they are a model's own; of an axis's other parts
            at most one may be open.
        order: all parts, numbered through, as they follow each other in [batch, head, query, width].
        over: what the softmax runs over: "positions", or "features" (channels).
    """

    parts: tuple[tuple[Part, ...], ...]
    order: tuple[int, ...]
    over: Literal["positions", "features"] = "positions"

    @classmethod
    def plain(cls, layout: str = "bhqd", heads: int | None = None) -> Axes:
        """One part per axis, from a letter each: b, h, q and d."""
        roles = [_SPELLED[letter] for letter in layout]
        parts = tuple((Part(role, heads if role == "head" else None),) for role in roles)
        return cls(parts, tuple(sorted(range(len(roles)), key=lambda i: _ROLES.index(roles[i]))))

    @classmethod
    def parse(cls, text: str, heads: int | None = None) -> Axes:
        """Axes as a user states them, in the notation of einops: "(head batch) query width".

        Args:
            text: names are batch, window, head, query and width; several of a kind are numbered: head1, head2. A size
                is given as in "(head=4 batch) query width".
            heads: sizes of heads that the text does not give.

        Raises:
            CaptureError: the text is no such list, or leaves a size open.

        >>> print(Axes.parse("(head=4 batch) query width"))
        (head=4 batch) query width
        """
        hint = 'name each axis of the kernel\'s output, such as "(head=4 batch) query width"'
        parts: list[list[Part]] = []
        inside = False
        if _TOKEN.sub("", text).strip():
            raise CaptureError(f'"{text}" is no layout', hint=hint)
        for token in _TOKEN.findall(text):
            if token in "()":
                if inside == (token == "("):
                    raise CaptureError(f'"{text}" has brackets that do not match', hint=hint)
                inside = not inside
                parts.extend([[]] if inside else [])
                continue
            name, _, size = token.partition("=")
            role = _SPELLED.get(name.rstrip("0123456789"))
            if role is None:
                raise CaptureError(f'a layout has no "{name}"', hint=f"names are {', '.join(_ROLES)} and window")
            part = Part(role, int(size) if size else heads if role == "head" else None)
            parts.append([part]) if not inside else parts[-1].append(part)
        flat = [part for axis in parts for part in axis]
        if inside or [part.role for part in flat].count("width") != 1 or not any(p.role == "query" for p in flat):
            raise CaptureError(f'the layout "{text}" needs a query and one width', hint=hint)
        if any(len(axis) > 1 and sum(part.size is None for part in axis) > 1 for axis in parts):
            raise CaptureError(f'the layout "{text}" leaves the sizes of an axis open', hint=hint)
        order = sorted(range(len(flat)), key=lambda i: _ROLES.index(flat[i].role))
        return cls(tuple(map(tuple, parts)), tuple(order))

    def __str__(self) -> str:
        written = []
        for axis in self.parts:
            open_alone = [
                f"{role}={size}" if role == "head" and size and len(axis) > 1 else role for role, size in axis
            ]
            written.append(open_alone[0] if len(axis) == 1 else f"({' '.join(open_alone)})")
        return " ".join(written)

    @cached_property
    def is_plain(self) -> bool:
        """Whether the output is [batch, head, query, width] as it is."""
        return [tuple(part.role for part in axis) for axis in self.parts] == [(role,) for role in _ROLES]

    def bind(self, shape: Sequence[int]) -> Bound | None:
        """The axes of an output of that shape; None if it does not fit, and the proof has to be made anew."""
        if len(shape) != len(self.parts):
            return None
        sizes: list[tuple[int, ...]] = []
        for axis, n in zip(self.parts, shape, strict=True):
            known = prod(part.size or 1 for part in axis)
            free = [part for part in axis if part.size is None]
            if n % known or (not free and n != known) or len(free) > 1:
                return None
            sizes.append(tuple(part.size or n // known for part in axis))
        return Bound(self, tuple(sizes))


@dataclass(frozen=True)
class Bound:
    """Axes with the sizes that they have in one call.

    Attributes:
        sizes: by axis of the output, of each part.
    """

    axes: Axes
    sizes: tuple[tuple[int, ...], ...]

    def count(self, role: Role) -> int:
        """How many there are of a role."""
        parts = zip(self.axes.parts, self.sizes, strict=True)
        return prod(n for axis, sizes in parts for part, n in zip(axis, sizes, strict=True) if part.role == role)

    def arrange(self, t: Tensor, of: Sequence[int | None], *, whole_batch: bool = True) -> Tensor:
        """A tensor of the call as [batch, head, (query,) rest ...], each in the order in which the projection has it.

        Args:
            of: for each axis of `t` the axis of the output that it runs along; None for those of its own, which come
                last. Along an axis `t` may have one index for all, and along heads fewer than the output (groups).
            whole_batch: give every example its own, also where one holds for all.

        Raises:
            CaptureError: its sizes are not those of the call.
        """
        flat = [part for axis in self.axes.parts for part in axis]
        starts = [sum(len(axis) for axis in self.axes.parts[:i]) for i in range(len(self.axes.parts))]
        shape: list[int] = []
        place: dict[int, int] = {}  # part -> axis of the tensor taken apart
        rest: list[int] = []
        for along, n in zip(of, t.shape, strict=True):
            axis = None if along is None else along % len(self.sizes)
            if axis is None:
                rest.append(len(shape))
                shape.append(n)
                continue
            for i, size in enumerate(self._split(axis, n, tuple(t.shape))):
                place[starts[axis] + i] = len(shape)
                shape.append(size)
        missing = [i for i in range(len(flat)) if i not in place]
        for i in missing:
            place[i] = len(shape)
            shape.append(1)
        t = t.reshape(shape)
        full = [size for sizes in self.sizes for size in sizes]
        groups: list[list[int]] = [[i for i in self.axes.order if flat[i].role == role] for role in ("batch", "head")]
        queries = [i for i in self.axes.order if flat[i].role == "query" and i not in missing]
        t = t.permute([place[i] for i in (*groups[0], *groups[1], *queries)] + rest + self._ones(place, flat, missing))
        t = t.reshape(t.shape[: t.dim() - len(self._ones(place, flat, missing))])
        batch, heads = len(groups[0]), len(groups[1])
        wanted = [full[i] for i in groups[0]]
        if any(t.shape[k] != wanted[k] for k in range(batch)) and (whole_batch or any(n > 1 for n in t.shape[:batch])):
            t = t.expand(*wanted, *t.shape[batch:])
        wanted = [full[i] for i in groups[1]]
        got = list(t.shape[batch : batch + heads])
        shared = next((k for k in range(heads) if got[k] == 1 < wanted[k]), heads)
        if any(n > 1 for n in got[shared:]):  # shared along the outer part, not along the inner: no groups
            t = t.expand(*t.shape[:batch], *wanted, *t.shape[batch + heads :])
        after = t.shape[batch + heads :]
        query = [prod(after[: len(queries)])] if queries else []
        return t.reshape(prod(t.shape[:batch]), prod(t.shape[batch : batch + heads]), *query, *after[len(queries) :])

    @staticmethod
    def _ones(place: Mapping[int, int], flat: Sequence[Part], missing: Sequence[int]) -> list[int]:
        """Axes of size 1 that stand for parts which the tensor does not have, and nobody wants."""
        return [place[i] for i in missing if flat[i].role in ("query", "width")]

    def _split(self, axis: int, n: int, shape: tuple[int, ...]) -> Sequence[int]:
        sizes, parts = self.sizes[axis], self.axes.parts[axis]
        if n == prod(sizes):
            return sizes
        if n == 1:
            return [1] * len(sizes)
        if all(part.role == "head" for part in parts) and prod(sizes) % n == 0 and len(parts) == 1:
            return [n]
        raise CaptureError(f"an axis of {n} does not fit the layout {self.axes}", shape=shape)

    def heads(self, output: Tensor) -> Tensor:
        """The kernel's output, or its gradient, as [batch, head, query, width]."""
        if self.axes.is_plain:
            return output
        return self._flattened(output.reshape([n for sizes in self.sizes for n in sizes]).permute(self.axes.order))

    def _flattened(self, t: Tensor) -> Tensor:
        flat = [part.role for axis in self.axes.parts for part in axis]
        roles = [flat[i] for i in self.axes.order]
        shape = [prod(n for n, one in zip(t.shape, roles, strict=True) if one == role) for role in _ROLES]
        return t.reshape(shape)

    def output(self, z: Tensor) -> Tensor:
        """What the kernel gives where its heads give `z` [batch, head, query, width]."""
        if self.axes.is_plain:
            return z
        full = [size for sizes in self.sizes for size in sizes]
        t = z.reshape([full[i] for i in self.axes.order])
        back = sorted(range(len(full)), key=lambda i: self.axes.order[i])
        return t.permute(back).reshape([prod(sizes) for sizes in self.sizes])


@dataclass(frozen=True)
class Proof:
    """What the values say of a call's axes.

    Attributes:
        axes: what they are, or None.
        reason: why they are not known; "" if they are.
        gate: each row has values of its own: a softmax that weighs experts or branches, no attention.
    """

    axes: Axes | None
    reason: str = ""
    gate: bool = False


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

    def role(axis: int, stride: int) -> Role:
        if axis == width:
            return "width"
        if axis in mixed:
            return "query" if alone or features_mixed or stride >= features else "head"
        return "head" if stride < features else "batch"

    roles = [(axis, Part(role(axis, stride), size), stride) for axis, size, stride in pieces]
    with_queries = {_axis_of(stride, into) for _, part, stride in roles if part.role == "query"}

    def place(part: Part, stride: int) -> tuple[int, bool, int]:
        """Windows come after examples: their rows stand among those of the queries."""
        window = part.role == "batch" and _axis_of(stride, into) in with_queries
        return _ROLES.index(part.role), window, -stride

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
    return Proof(Axes(opened, tuple(order), "features" if features_mixed else "positions"))


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


def usual_axes(shape: Sequence[int], mixed: Sequence[int], width: int, heads: int | None) -> Axes | None:
    """The axes that most models have, to be proved afterwards: [batch, head, query, width], or with the first two as
    one; None for other shapes.
    """
    if tuple(axis % len(shape) for axis in (*mixed, width)) != (len(shape) - 2, len(shape) - 1):
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
