"""Moves attention between devices until none has much more than the mean, by what each move sends.

The greedy planner of core attention disaggregation (arXiv 2510.18121, 4): devices with the largest deficit first; each
takes the piece that sends the fewest bytes for the pairs that it brings, whole or cut at both ends of its document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workbench.errors import CaptureError
from workbench.kernels.disaggregation.items import Item, Sizes


@dataclass(frozen=True)
class Move:
    """An item that one device computes for another, and the bytes that go between them for it."""

    item: Item
    giver: int
    taker: int
    n_bytes: int


@dataclass(frozen=True)
class Plan:
    """Who computes what.

    Attributes:
        items: of each device. moves: in the order in which they were found.
        before: pairs of each device as the documents were packed.
    """

    items: tuple[tuple[Item, ...], ...]
    moves: tuple[Move, ...]
    before: tuple[int, ...] = field(repr=False)

    @property
    def loads(self) -> tuple[int, ...]:
        """Pairs of tokens of each device."""
        return tuple(sum(item.pairs for item in items) for items in self.items)

    @property
    def imbalance(self) -> tuple[float, float]:
        """Largest over mean load, before and after."""
        mean = sum(self.before) / len(self.before)
        return max(self.before) / mean, max(self.loads) / mean

    @property
    def traffic(self) -> tuple[int, ...]:
        """Bytes that each device sends or is sent."""
        found = [0] * len(self.items)
        for move in self.moves:
            found[move.giver] += move.n_bytes
            found[move.taker] += move.n_bytes
        return tuple(found)

    def __repr__(self) -> str:
        before, after = self.imbalance
        return (
            f"Plan({len(self.items)} devices: largest load {before:.2f} of the mean, {after:.2f} after "
            f"{len(self.moves)} moves of {sum(move.n_bytes for move in self.moves) / 2**20:,.0f} MiB)"
        )


def plan(placed: Sequence[Sequence[Item]], sizes: Sizes | None = None, tolerance: float = 0.1) -> Plan:
    """Move items until every device has at most 1 + `tolerance` of the mean load.

    A row and its mirror image stay together: where those of the longest document are more than `tolerance` of the mean,
    as few documents on many devices are, loads stay farther apart.

    Args:
        placed: the items of each device, as of `packed`. sizes: of a layer, for what a move sends.
        tolerance: the share of the mean by which loads may differ from it.

    Raises:
        CaptureError: no devices, no items, or a tolerance below 0.

    >>> from workbench.kernels.disaggregation.items import packed
    >>> made = plan(packed([4096] + [256] * 16, 2))
    >>> [round(load, 2) for load in made.imbalance]
    [1.88, 1.0]
    """
    balance = _Balance([list(each) for each in placed], sizes or Sizes())
    before = tuple(balance.loads)
    if not sum(before):
        raise CaptureError("there is nothing to plan", hint="pass the items of each device, as of packed(lengths, n)")
    if not tolerance >= 0:
        raise CaptureError(f"the tolerance is a share of the mean, not {tolerance}")
    mean = sum(before) / len(before)
    for taker in balance.by_load():
        while mean - balance.loads[taker] > tolerance * mean:
            givers = [giver for giver, load in enumerate(balance.loads) if load > mean]
            if not balance.move(givers, taker, mean - balance.loads[taker], mean):
                break
    for giver in reversed(balance.by_load()):  # no device lacks as much as this one has above the tolerance
        while balance.loads[giver] > (1 + tolerance) * mean:
            taker = balance.by_load()[0]
            if not balance.move([giver], taker, (1 + tolerance) * mean - balance.loads[taker], mean):
                break
    return Plan(tuple(tuple(sorted(each)) for each in balance.items), tuple(balance.moves), before)


class _Balance:
    """Items and loads while they are moved."""

    def __init__(self, items: list[list[Item]], sizes: Sizes) -> None:
        self.items, self.sizes = items, sizes
        self.loads = [sum(item.pairs for item in each) for each in items]
        self.moves: list[Move] = []

    def by_load(self) -> list[int]:
        """The devices, that with the least load first."""
        return sorted(range(len(self.loads)), key=lambda device: (self.loads[device], device))

    def move(self, givers: Sequence[int], taker: int, need: float, mean: float) -> bool:
        """Move the piece that sends the fewest bytes for a pair; False if there is none.

        Args:
            need: pairs that the taker may be given. mean: load that no giver falls below.
        """
        best: tuple[float, int, int, int] | None = None
        for giver in givers:
            room = min(need, self.loads[giver] - mean)
            for index, item in enumerate(self.items[giver]):
                rows = min(int(room // (item.length + 1)), item.last - item.first)
                if rows > 0:
                    bytes_for_a_pair = self.sizes.traffic(2 * rows, item.n_keys) / (rows * (item.length + 1))
                    best = min(best or (bytes_for_a_pair, giver, index, rows), (bytes_for_a_pair, giver, index, rows))
        if best is None:
            return False
        _, giver, index, rows = best
        item = self.items[giver].pop(index)
        if rows < item.last - item.first:
            item, rest = item.cut(rows)
            self.items[giver].insert(index, rest)
        self.items[taker].append(item)
        self.loads[giver] -= item.pairs
        self.loads[taker] += item.pairs
        self.moves.append(Move(item, giver, taker, self.sizes.traffic(item.n_rows, item.n_keys)))
        return True
