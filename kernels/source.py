"""What streaming reads of a map: its sizes, its mask, and functions that make tiles of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from workbench.kernels.masks import Mask
from workbench.kernels.plan import Pass
from workbench.kernels.statistics.options import Options
from workbench.kernels.tile import Space

TileMaker = Callable[[slice, slice], tuple[Tensor, Tensor | None]]
"""Makes (p, log₂ p or None) of some queries and keys."""
RawTileMaker = Callable[[slice, slice], Tensor]
"""Makes masked scores, or weights that may be negative, of some queries and keys."""


class TileSource(Protocol):
    """A map [batch, head, query, key] whose tiles can be made.

    Attributes:
        head_group: how many neighbouring heads share keys and layout, so that they are streamed together.
        tile_scale: how many times as large as others its tiles may be.
        sinks: [head] logits that join the softmax's denominator only; None for none.
        has_scores: whether raw tiles are scores of a softmax.
    """

    tile_scale: int

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    @property
    def mask(self) -> Mask: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def head_group(self) -> int: ...

    @property
    def sinks(self) -> Tensor | None: ...

    @property
    def has_scores(self) -> bool: ...

    def space(self) -> Space:
        """Sizes and mask counts, for the accumulators."""

    def maker(self, batch: slice, heads: slice, wants_log: bool) -> TileMaker:
        """Makes normalised tiles for these batch entries and heads."""

    def raw_maker(self, batch: slice, heads: slice) -> RawTileMaker:
        """Makes tiles before normalisation."""


class FusedMagnitudes(Protocol):
    """What collects statistics of |A|, normalised per row, in few launches."""

    def refusal(self, names: Sequence[str], options: Options) -> str | None:
        """Why it cannot make these; None if it can."""

    @property
    def row_sums(self) -> Callable[[], Tensor]:
        """Gives Σ A of each row [batch, head, query]."""

    def collect(self, each: Pass, options: Options, lse: Tensor | None) -> dict[str, Tensor]:
        """The raw sums of one pass, where rows without weight are NaN; with "lse" where that is not given.

        Args:
            lse: [batch, head, query] ln Σ |A| of the rows; −1e20 in those without weight.
        """


class Streamed(TileSource, Protocol):
    """A pattern, as `streaming.statistics` asks for its statistics."""

    @property
    def by_magnitude(self) -> bool: ...

    @property
    def denominators_known(self) -> bool: ...

    def check(self) -> None:
        """Raise a CaptureError that names the first NaN or inf among its tensors."""

    def collect(self, each: Pass, options: Options) -> dict[str, Tensor]:
        """The raw sums of one pass."""

    def engines(self, names: Sequence[str], options: Options) -> set[str]:
        """Names of the engines that stream these statistics in one pass."""

    def unfused(self, names: Sequence[str], options: Options) -> str | None:
        """Why plain torch streams some of them; None where it does not."""

    def magnitude(self) -> Streamed:
        """|A| normalised per row."""

    def value_weighted(self) -> Streamed:
        """|A|·‖v‖ normalised per row."""
