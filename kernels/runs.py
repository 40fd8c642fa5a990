"""Runs of neighbouring tokens as rows of a table, which are gathered and written without a copy of the whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Runs:
    """A tensor [batch, head, token, d] whose tokens are cut into runs.

    Where the tokens of a head lie one behind the other, a run is one row of the table. Elsewhere, as in what a linear
    layer gave for all heads, a run is as many rows as it has tokens: so the tensor is read where it lies.

    Attributes:
        table: [row, number], which shares its memory with the tensor unless that had to be padded or put in order.
        steps: rows from one example, one head and one run to the next.
        inside: [row] offsets of the rows of a run.
    """

    table: Tensor
    steps: tuple[int, int, int]
    inside: Tensor

    @classmethod
    def of(cls, x: Tensor, run: int, n_runs: int, front: int = 0) -> Runs:
        """The runs of x, padded with zeros to so many.

        Args:
            x: [batch, head, token, d]. run: tokens in a run. front: rows of padding before the first token.
        """
        padding = n_runs * run - front - x.shape[2]
        if front or padding:
            x = F.pad(x, (0, 0, front, padding))
        b, h, n, d = x.shape
        strides = x.stride()
        if x.is_contiguous() or not x.numel() or strides[3] != 1 or any(step % d for step in strides[:3]):
            return cls(x.reshape(b * h * n_runs, run * d), (h * n_runs, n_runs, 1), torch.zeros(1, dtype=torch.long))
        of_batch, of_head, of_token = (step // d for step in strides[:3])
        rows = 1 + (b - 1) * of_batch + (h - 1) * of_head + (n - 1) * of_token
        inside = torch.arange(run) * of_token
        return cls(x.as_strided((rows, d), (d, 1)), (of_batch, of_head, run * of_token), inside)

    def rows(self, batch: Tensor, head: Tensor, run: Tensor) -> Tensor:
        """[row] of the table, for indices that broadcast, in their order."""
        first = batch * self.steps[0] + head * self.steps[1] + run * self.steps[2]
        return (first[..., None] + self.inside.to(first.device)).flatten()
