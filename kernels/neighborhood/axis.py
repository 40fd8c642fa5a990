"""The window rule of one dimension: which positions a position sees under window, stride, dilation and causality.

Generalized Neighborhood Attention, arXiv 2504.16922, with the border rule of its reference implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import CaptureError


@dataclass(frozen=True)
class Axis:
    """One dimension of a neighborhood.

    Positions that are equal mod `dilation` form a class; a position sees only its own class, in which it counts as
    position // dilation. In a class, `stride` neighbours share the window of their leader: the middle one (right of the
    middle for an even stride), or the last one if causal. A window of even size reaches one further to the left.
    At a border the window is moved inwards, so that it always holds `window` positions; a causal window is cut instead.

    Raises:
        CaptureError: a number out of range; the message names it.

    >>> [len(Axis(12, 4, 3, 1, True).seen_by(x)) for x in range(12)]
    [1, 2, 3, 2, 3, 4, 2, 3, 4, 2, 3, 4]
    >>> Axis(6, 3).seen_by(0), Axis(6, 3).seen_by(3), Axis(6, 3, dilation=2).seen_by(1)
    ([0, 1, 2], [2, 3, 4], [1, 3, 5])
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise CaptureError(f"a dimension of {self.length} positions is empty")
        if not 1 <= self.window <= self.length:
            raise CaptureError(f"window={self.window} is not one of 1 to {self.length}, the length of its dimension")
        if not 1 <= self.stride <= self.window:
            raise CaptureError(
                f"stride={self.stride} is not one of 1 to {self.window}, the window",
                hint="stride=1 slides by one, stride=window gives separate blocks",
            )
        if self.dilation < 1:
            raise CaptureError(f"dilation={self.dilation} is below 1", hint="1 sees neighbours without gaps")
        if self.window * self.dilation > self.length:
            raise CaptureError(
                f"window={self.window} with dilation={self.dilation} reaches over {self.window * self.dilation} "
                f"positions, the dimension has {self.length}",
                hint=f"take a dilation of at most {self.length // self.window}",
            )

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """First and last position seen by each of these positions, counted in its class."""
        at = x // self.dilation
        size = self.length // self.dilation + (x % self.dilation < self.length % self.dilation).to(x.dtype)
        group = at // self.stride * self.stride
        if self.causal:
            lead = torch.minimum(group + self.stride - 1, size - 1)
            return (lead - self.window + 1).clamp(min=0), at
        left = self.window // 2
        right = self.window - left - 1
        lead = torch.minimum(group + self.stride // 2, size - 1)
        middle = torch.minimum(lead.clamp(min=left), size - 1 - right)
        return middle - left, middle + right

    def sees(self, x: Tensor, y: Tensor) -> Tensor:
        """Bool, broadcast: whether position x sees position y."""
        low, high = self.bounds(x)
        at = y // self.dilation
        found = (low <= at) & (at <= high)
        return found & (x % self.dilation == y % self.dilation) if self.dilation > 1 else found

    def table(self, x: Tensor) -> Tensor:
        """[position of x, position] bool: `sees` for all positions, in the time of the windows alone."""
        low, high = self.bounds(x)
        at = torch.minimum(low[:, None] + torch.arange(self.window), high[:, None])
        found = torch.zeros(len(x), self.length, dtype=torch.bool)
        return found.scatter_(1, at * self.dilation + x[:, None] % self.dilation, True)

    def seen_by(self, x: int) -> list[int]:
        """The positions that one position sees."""
        low, high = (int(bound) for bound in self.bounds(torch.tensor(x)))
        return [at * self.dilation + x % self.dilation for at in range(low, high + 1)]

    @property
    def classes(self) -> list[tuple[int, int, int]]:
        """Of the dilation classes, the longest first: the first position, the length, and how many are as long.

        >>> Axis(8, 2, dilation=3).classes
        [(0, 3, 2), (2, 2, 1)]
        """
        short, longer = divmod(self.length, self.dilation)
        found = [(0, short + 1, longer), (longer, short, self.dilation - longer)]
        return [(start, length, alike) for start, length, alike in found if length and alike]

    def tiles(self, size: int, offset: int = 0) -> Tensor:
        """[tile, size] positions, class after class, `size` neighbours of a class to a tile; -1 for padding.

        The first tile of a class is padded by `offset` in front.

        >>> Axis(5, 2, dilation=2).tiles(2).tolist(), Axis(4, 2).tiles(3, 2).tolist()
        ([[0, 2], [4, -1], [1, 3]], [[-1, -1, 0], [1, 2, 3]])
        """
        found = []
        for start in range(min(self.dilation, self.length)):
            members = torch.arange(start, self.length, self.dilation)
            padding = offset, -(offset + len(members)) % size
            found.append(torch.nn.functional.pad(members, padding, value=-1).view(-1, size))
        return torch.cat(found)

    def spans(self, size: int) -> tuple[Tensor, Tensor]:
        """For each of the `tiles`, the first and last position that any of its members sees, counted in their class.

        All between are seen by some member, since windows of neighbouring groups meet: stride <= window.
        """
        tiles = self.tiles(size)
        low, high = self.bounds(tiles.clamp(min=0))
        low = low.masked_fill(tiles < 0, self.length)
        return low.amin(1), high.masked_fill(tiles < 0, -1).amax(1)

    def boxes(self, size: int) -> Tensor:
        """[tile, widest span] the positions that each tile visits; -1 for padding."""
        low, high = self.spans(size)
        at = low[:, None] + torch.arange(int((high - low).max()) + 1)
        return torch.where(at <= high[:, None], at * self.dilation + self.tiles(size)[:, :1] % self.dilation, -1)

    def meets(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """[query tile, key tile] bool: whether some query of one sees some key of the other; whether all see all.

        Args:
            queries, keys: what `tiles` gave.

        >>> axis = Axis(4, 2, 2)
        >>> some, every = axis.meets(axis.tiles(2), axis.tiles(2))
        >>> torch.equal(some, torch.eye(2) > 0), torch.equal(every, some)
        (True, True)
        """
        low, high = self.bounds(queries.clamp(min=0))
        padding = queries < 0
        lowest, latest = low.masked_fill(padding, self.length).amin(1), low.masked_fill(padding, -1).amax(1)
        highest, earliest = high.masked_fill(padding, -1).amax(1), high.masked_fill(padding, self.length).amin(1)
        at = keys // self.dilation
        first, last = at.masked_fill(keys < 0, self.length).amin(1), at.masked_fill(keys < 0, -1).amax(1)
        alike = queries.amax(1)[:, None] % self.dilation == keys.amax(1) % self.dilation
        some = alike & (first <= highest[:, None]) & (last >= lowest[:, None])
        every = alike & (first >= latest[:, None]) & (last <= earliest[:, None])
        return some, every
