"""What engines are given: the description of one softmax over queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.mask_summary import MaskSummary
from workbench.kernels.masks import Mask
from workbench.kernels.tile import Space


@dataclass(frozen=True, eq=False)
class SoftmaxProblem:
    """softmax(softcap(scale · q kᵀ) + bias), over the keys that the mask shows.

    Attributes:
        q: [batch, head, query, d_head].
        k: [batch, kv head, key, d_head]; heads are a multiple of kv heads (grouped-query attention).
        mask: visibility and additive bias.
        scale: factor on q kᵀ.
        softcap: scores become softcap · tanh(score / softcap); None for none.
        sinks: [head] logits that join the denominator only; None for none.
        key_bias: [batch, head or 1, key] added to the scores; None for none.
        lse: [batch, head, query] natural log of each row's denominator, finite also in rows that see no key; in
            float64 where scores are so large that float32 would round weights; None where it is still to be found.
        of_magnitudes: the softmax is that of ln |scale · q kᵀ|: |q kᵀ| normalised per row. Only the Triton kernels know
            it, and no registered engine is given one.
        fades: [batch or 1, head, key] float64 G, in the place of key_bias: G_i − G_j is added to the score of i and j.
            Queries are keys: query 0 is the one at the mask's offset. Only with `of_magnitudes`.
    """

    q: Tensor
    k: Tensor
    mask: Mask
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    key_bias: Tensor | None = None
    lse: Tensor | None = None
    of_magnitudes: bool = False
    fades: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        b, h, n_queries, _ = self.q.shape
        return b, h, n_queries, self.k.shape[2]

    @property
    def n_kv_heads(self) -> int:
        """How many heads of keys there are."""
        return self.k.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of scores and statistics: float64 for float64 queries, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.q.device

    @property
    def seen(self) -> MaskSummary:
        """What the mask lets through, counted per query and per key."""
        return self.mask.summary(self.device)

    @property
    def head_group(self) -> int:
        """How many neighbouring heads share keys and layout."""
        return self.mask.head_group(self.shape[1], self.n_kv_heads)

    def space(self) -> Space:
        """Sizes and mask counts, for the accumulators."""
        all_see = not self.mask.may_hide_all
        return Space(*self.shape, self.mask, self.seen, self.device, self.dtype, all_see)
