"""Which axis of a kernel call is batch, head and query: how that is written down, and applied to the call's tensors.

A tap sees tensors; what their axes mean is shown by value (`by_value`), left to sizes (`by_size`) or stated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from workbench.errors import CaptureError

Role = Literal["batch", "head", "query", "width"]
ROLES: tuple[Role, ...] = ("batch", "head", "query", "width")
_SPELLED: Mapping[str, Role] = {
    **{role: role for role in ROLES},
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
        return cls(parts, tuple(sorted(range(len(roles)), key=lambda i: ROLES.index(roles[i]))))

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
                raise CaptureError(f'a layout has no "{name}"', hint=f"names are {', '.join(ROLES)} and window")
            part = Part(role, int(size) if size else heads if role == "head" else None)
            parts.append([part]) if not inside else parts[-1].append(part)
        flat = [part for axis in parts for part in axis]
        if inside or [part.role for part in flat].count("width") != 1 or not any(p.role == "query" for p in flat):
            raise CaptureError(f'the layout "{text}" needs a query and one width', hint=hint)
        if any(len(axis) > 1 and sum(part.size is None for part in axis) > 1 for axis in parts):
            raise CaptureError(f'the layout "{text}" leaves the sizes of an axis open', hint=hint)
        order = sorted(range(len(flat)), key=lambda i: ROLES.index(flat[i].role))
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
        return [tuple(part.role for part in axis) for axis in self.parts] == [(role,) for role in ROLES]

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
        shape = [prod(n for n, one in zip(t.shape, roles, strict=True) if one == role) for role in ROLES]
        return t.reshape(shape)

    def output(self, z: Tensor) -> Tensor:
        """What the kernel gives where its heads give `z` [batch, head, query, width]."""
        if self.axes.is_plain:
            return z
        full = [size for sizes in self.sizes for size in sizes]
        t = z.reshape([full[i] for i in self.axes.order])
        back = sorted(range(len(full)), key=lambda i: self.axes.order[i])
        return t.permute(back).reshape([prod(sizes) for sizes in self.sizes])

    def agrees(self, other: Bound) -> bool:
        """Whether both put every number at the same place of [batch, head, query, width]."""
        if self.axes.over != other.axes.over:
            return False
        shape = [prod(sizes) for sizes in self.sizes]
        numbers = torch.arange(prod(shape)).view(shape)
        x, y = self.heads(numbers), other.heads(numbers)
        return x.shape == y.shape and torch.equal(x, y)
