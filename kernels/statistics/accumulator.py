"""What collects a statistic from tiles: it sees every tile of a pattern once and keeps O(queries + keys) numbers.

Sums run in the pattern's dtype, over partial sums of one tile each; only what cancels (distances) runs in float64. What
they give are raw sums; `finish` makes statistics of them.

Tiles come in strips: what the same rows see. Per tile only its large operations run; what they give is put together
once per strip, in `close`, since a hundred operations on small tensors cost as much as the products.

Where a row's denominator is not known yet, tiles hold exp(score − lead) with a lead that rises; `rescale` then puts
what was collected on the new scale, and `normalise` divides by the denominator in the end (the online softmax).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.statistics.options import Options
from workbench.kernels.tile import Online, Rows, Space, Tile


class Accumulator(ABC):
    """Collects one statistic, or several that share their work.

    Attributes:
        wants_log: whether tiles need their `log_p`, which it may use up.
    """

    wants_log = False

    def __init__(self, space: Space, options: Options) -> None:
        self.space, self.options = space, options

    @abstractmethod
    def add(self, tile: Tile) -> None:
        """Take one tile into account."""

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """The raw sums, by name."""

    def close(self, rows: Rows) -> None:  # noqa: B027 - most that need it override it
        """Put together what the tiles of these rows gave so far; called now and then, and after their last tile."""

    def end_rows(self, rows: Rows) -> None:  # noqa: B027
        """Take these rows as done: their last tile was closed."""

    def rescale(self, rows: Rows, online: Online) -> None:
        """Put what these rows have collected on a new scale; only row statistics can be."""
        raise _needs_denominators(self)

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Divide by the denominators [batch, head, query]; `mass` is the part of them that is due to keys."""
        raise _needs_denominators(self)


def _needs_denominators(accumulator: Accumulator) -> CaptureError:
    return CaptureError(
        f"{type(accumulator).__name__} cannot collect before each row's denominator is known",
        hint="register its statistic with needs_denominators=True, or give it rescale() and normalise()",
    )


class RowSum(Accumulator):
    """A statistic that is a sum over the weights of a row; tiles leave their sums [b, h, q] in `of_tiles`."""

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.total = space.per_query()
        self.of_tiles: list[Tensor] = []

    def close(self, rows: Rows) -> None:
        """Add the sums of the tiles."""
        if self.of_tiles:
            self.total[rows].add_(self.of_tiles[0] if len(self.of_tiles) == 1 else torch.stack(self.of_tiles).sum(0))
            self.of_tiles.clear()

    def rescale(self, rows: Rows, online: Online) -> None:
        """Sums of weights scale as weights do."""
        self.total[rows] *= online.factor

    def normalise(self, denominator: Tensor, mass: Tensor) -> None:
        """Sums of weights are normalised as weights are."""
        self.total /= denominator
