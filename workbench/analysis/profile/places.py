"""Where tokens stand: on a grid of patches after some prefix tokens, or in a row; and which offsets that gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError

TOKENS = "tokens"
"""What `grid` is called where distance is counted in tokens."""


@dataclass(frozen=True)
class Places:
    """A grid of tokens after a prefix; text is one row without a prefix.

    Attributes:
        rows, columns: of the grid. prefix: tokens before it, such as CLS. text: whether it is text.
    """

    rows: int
    columns: int
    prefix: int = 0
    text: bool = False

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.prefix + self.rows * self.columns

    @property
    def map_shape(self) -> tuple[int, int]:
        """Rows and columns of a map over offsets."""
        return 2 * self.rows - 1, 2 * self.columns - 1

    @property
    def farthest(self) -> int:
        """The most hops there can be between two tokens."""
        return max(self.rows, self.columns) - 1

    def offsets(self, queries: slice, keys: slice) -> Tensor:
        """[query, key] index into the flattened map over (dy, dx) = place of the key − place of the query."""
        i, j = (torch.arange(s.start, s.stop) - self.prefix for s in (queries, keys))
        dy = j[None] // self.columns - i[:, None] // self.columns
        dx = j[None] % self.columns - i[:, None] % self.columns
        return (dy + self.rows - 1) * self.map_shape[1] + dx + self.columns - 1

    def steps(self) -> tuple[Tensor, Tensor]:
        """dy and dx of every cell of the flattened map."""
        dy = torch.arange(-self.rows + 1, self.rows)[:, None].expand(self.map_shape)
        dx = torch.arange(-self.columns + 1, self.columns)[None].expand(self.map_shape)
        return dy.flatten(), dx.flatten()

    def hops(self) -> Tensor:
        """[cell] max(|dy|, |dx|): in text the distance in tokens, on a grid the ring."""
        dy, dx = self.steps()
        return torch.maximum(dy.abs(), dx.abs())

    def distances(self) -> Tensor:
        """[cell] Euclidean distance √(dy² + dx²), in patches or tokens."""
        dy, dx = self.steps()
        return (dy.double() ** 2 + dx.double() ** 2).sqrt()

    def diagonal(self, back: int) -> Tensor:
        """[cell] bool: whether the key stands `back` places before the query in the order of the sequence."""
        dy, dx = self.steps()
        return dy * self.columns + dx == -back


def bins(farthest: int, text: bool) -> tuple[tuple[int, int], ...]:
    """First and last hop of each bin: every ring of a grid; of text single tokens up to 4, then doubling.

    >>> bins(20, text=True)
    ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 8), (9, 16), (17, 20))
    """
    edges, last = [(k, k) for k in range(min(farthest, farthest if not text else 4) + 1)], 4
    while text and last < farthest:
        edges.append((last + 1, min(2 * last, farthest)))
        last *= 2
    return tuple(edges)


def find_places(
    lengths: Sequence[tuple[str, int]],
    grid: tuple[int, int] | str | None,
    prefix: int | None,
    known: Mapping[str, Any] | None,
) -> Places:
    """Where the tokens of an analysis stand.

    Args:
        lengths: (site, number of tokens) of all sites and forwards.
        grid: rows and columns of patches, "tokens", or None for what the model tells.
        prefix: tokens before the patches; None for what the model tells, else for all that are too many.
        known: what the model tells, as `workbench.storage.provenance.find_patches` gives it.

    Raises:
        WorkbenchError: a grid that is none, or that does not match the tokens.
    """
    if isinstance(grid, str) and grid != TOKENS:
        raise WorkbenchError(f'grid is (rows, columns), "{TOKENS}" or None, not "{grid}"')
    if grid == TOKENS or (grid is None and known is None):
        if prefix:
            raise WorkbenchError("prefix tokens stand before a grid of patches", hint="give grid=(rows, columns) too")
        return Places(1, max(length for _, length in lengths), text=True)
    if grid is None:
        assert known is not None
        rows, columns = known["grid"]
        before = known["prefix"] if prefix is None else prefix
    else:
        rows, columns = _checked(grid)
        before = lengths[0][1] - rows * columns if prefix is None else prefix
        if prefix is None and known is not None and before != known["prefix"]:
            before = known["prefix"]
    for site, length in lengths:
        if before < 0 or before + rows * columns != length:
            said = f" and {before} before them" if before > 0 else ""
            raise WorkbenchError(
                f"a grid of {rows} x {columns} patches{said} does not match {length} tokens",
                site=site,
                hint="give grid=(rows, columns) and prefix=, the number of tokens such as CLS before the patches, "
                f'choose the sites of the image with sites=, or count distance in tokens with grid="{TOKENS}"',
            )
    return Places(rows, columns, before)


def _checked(grid: Any) -> tuple[int, int]:
    if (
        not isinstance(grid, Sequence)
        or len(grid) != 2
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in grid)
    ):
        raise WorkbenchError(f"a grid is two numbers of at least 1, (rows, columns), not {grid!r}")
    return grid[0], grid[1]
