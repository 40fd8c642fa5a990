"""Pieces of the attention of documents: rows from the head, and those that mirror them from the tail.

Row r of a causal document of L tokens reads r + 1 keys, and row L − 1 − r reads L − r: together always L + 1. So pieces
that are cut at both ends at once cost in proportion to their rows, wherever they are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from workbench.errors import CaptureError


@dataclass(frozen=True, order=True)
class Item:
    """Rows `first` to `last` of a document, the last one left out, and those that mirror them.

    Attributes:
        document: its number. length: its tokens.
        first, last: rows of the head, 0 ≤ first < last ≤ ⌈length / 2⌉; the middle row of an odd length mirrors itself.

    >>> item = Item(0, 7, 2, 4)
    >>> list(item.rows), item.pairs, item.n_keys
    ([2, 3, 4], 12, 5)
    """

    document: int
    length: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last <= (self.length + 1) // 2:
            raise CaptureError(
                f"a document of {self.length} tokens has no rows {self.first} to {self.last} with mirror images",
                hint="rows of the head run from 0 to half of the length",
            )

    @classmethod
    def whole(cls, document: int, length: int) -> Item:
        """All rows of a document."""
        return cls(document, length, 0, (length + 1) // 2)

    @property
    def ranges(self) -> tuple[range, ...]:
        """The rows: those of the head, and those of the tail, or both in one where they meet."""
        head, tail = range(self.first, self.last), range(self.length - self.last, self.length - self.first)
        return (range(head.start, tail.stop),) if head.stop >= tail.start else (head, tail)

    @property
    def rows(self) -> tuple[int, ...]:
        """All of them, ascending."""
        return tuple(row for each in self.ranges for row in each)

    @property
    def n_rows(self) -> int:
        """How many there are."""
        return sum(map(len, self.ranges))

    @property
    def n_keys(self) -> int:
        """Keys that are read: those up to the last row."""
        return self.length - self.first

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees: (length + 1) for every row of the head, half of it for a middle."""
        middle = 2 * self.last > self.length
        return (self.last - self.first) * (self.length + 1) - middle * (self.length + 1) // 2

    def cut(self, n: int) -> tuple[Item, Item]:
        """Its first n rows of the head with their mirror images, and the rest.

        Raises:
            CaptureError: there would be no rest, or no first part.
        """
        return replace(self, last=self.first + n), replace(self, first=self.first + n)


@dataclass(frozen=True)
class Sizes:
    """What a layer of attention has: query heads, kv heads, width of a head, bytes of a number."""

    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    n_bytes: int = 2

    def traffic(self, rows: int, keys: int) -> int:
        """Bytes to have rows computed elsewhere: queries there, outputs with their log-sum-exps back, keys and values.

        The log-sum-exps are in float32.
        """
        queries = rows * self.heads * (2 * self.width * self.n_bytes + 4)
        return queries + keys * self.kv_heads * 2 * self.width * self.n_bytes


def packed(lengths: Sequence[int], n_devices: int, budget: int | None = None) -> list[list[Item]]:
    """The items of each device where documents are packed one after another, so many tokens on each.

    A document that does not fit what is left on a device is cut, head and tail alike; none has more than its budget.

    Args:
        lengths: tokens of each document.
        budget: tokens of a device; as few as are needed if None, the mean or one more.

    Raises:
        CaptureError: no documents, an empty one, or more tokens than all devices take.

    >>> [[item.pairs for item in items] for items in packed([4, 2, 2], 2)]
    [[10], [3, 3]]
    """
    if not lengths or min(lengths) < 1 or n_devices < 1:
        raise CaptureError(f"{len(lengths)} documents on {n_devices} devices", hint="each has at least one token")
    least = -(-sum(lengths) // n_devices)
    if budget is None:  # one more where rows, which go two at a time, leave a token free on devices
        return _filled(lengths, n_devices, least) or _filled(lengths, n_devices, least + 1) or []
    found = _filled(lengths, n_devices, budget) if budget >= least else None
    if found is None:
        raise CaptureError(
            f"{sum(lengths):,} tokens do not fit {n_devices} devices of {budget:,}",
            hint=f"rows are placed with their mirror images, two at a time: {least + 1:,} are enough",
        )
    return found


def _filled(lengths: Sequence[int], n_devices: int, budget: int) -> list[list[Item]] | None:
    """The items of each device; None where the last one would have more than its budget."""
    found: list[list[Item]] = [[] for _ in range(n_devices)]
    device, left = 0, budget
    for document, length in enumerate(lengths):
        rest: Item | None = Item.whole(document, length)
        while rest is not None:
            last = device == n_devices - 1
            if rest.n_rows <= left:
                found[device].append(rest)
                left, rest = left - rest.n_rows, None
            elif last:
                return None
            elif left >= 2:
                part, rest = rest.cut(left // 2)
                found[device].append(part)
                left -= part.n_rows
            if left < 2 and not last:
                device, left = device + 1, budget
    return found
