"""Whole rows of a pattern in float64: what the definition of a statistic is written on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.statistics.options import Options


@dataclass(frozen=True)
class WholeRows:
    """Some query rows of a map over all of its keys; all rows of it for column statistics.

    Attributes:
        p: [batch, head, query, key] float64 weights, zero where a key is hidden; see `by_magnitude`.
        seen: [batch, head, query, key] bool, which keys a row may see.
        offset: absolute position of the map's first query row; first: which of its rows `p` begins with.
        n_queries: rows of the map.
        options: what was asked for.
        lse: [batch, head, query] float64 log of the softmax denominator; None for patterns without scores, and in a
            definition that is streamed, as are the next two.
        signed, size: [batch, head, query] Σ A and Σ |A| of the rows as the model has them.
        by_magnitude: whether p is |A| normalised per row; a row without weight then counts as one that sees no key.
        batch: which batch entries these are.
    """

    p: Tensor
    seen: Tensor
    offset: int
    n_queries: int
    options: Options
    first: int = 0
    lse: Tensor | None = None
    signed: Tensor | None = None
    size: Tensor | None = None
    by_magnitude: bool = False
    batch: slice = field(default_factory=lambda: slice(None))

    @cached_property
    def i(self) -> Tensor:
        """[query, 1] absolute positions of the queries."""
        return torch.arange(self.p.shape[2], device=self.p.device)[:, None] + (self.offset + self.first)

    @cached_property
    def j(self) -> Tensor:
        """[1, key] positions of the keys."""
        return torch.arange(self.p.shape[3], device=self.p.device)[None, :]

    @cached_property
    def alive(self) -> Tensor:
        """[batch, head, query] bool: rows that have a distribution."""
        alive = self.seen.any(-1)
        return alive & (self.size > 0) if self.by_magnitude and self.size is not None else alive

    def of_all_batch(self, per_batch: Tensor) -> Tensor:
        """The rows of a [batch, ...] tensor, such as ids, that belong to these batch entries."""
        return per_batch.to(self.p.device)[self.batch]

    def scores_lse(self) -> Tensor:
        """`lse`, or the error that says why there is none."""
        if self.lse is None:
            raise CaptureError("a pattern without scores has no lse")
        return self.lse
