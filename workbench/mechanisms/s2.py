"""S2-Attention: each head sees nearby blocks and every v-th block further back, shifted from head to head."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from workbench.kernels.patterns import Pattern
from workbench.kernels.s2 import S2Layout, S2Pattern, s2_attention
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, by_blocks, register


class S2Attention(Mixer):
    """Softmax attention over local blocks, and verticals that together cover the whole past.

    Args:
        place: a causal sequence.
        block: tokens in a block, a power of two from 16 on; the largest up to 64 that fits eight times if None.
        local_blocks: blocks up to the query's own that are seen whole. vert_stride: of the others, each that many-th is
            seen; as many as heads that are not dense if None, so that the heads together see all.
        n_dense_heads: last heads that see everything.

    Raises:
        WorkbenchError: a size out of range; its message names it.
    """

    def __init__(
        self,
        place: Place,
        block: int | None = None,
        local_blocks: int = 1,
        vert_stride: int | None = None,
        n_dense_heads: int = 0,
    ) -> None:
        super().__init__(place)
        fitting = max(size for size in (16, 32, 64) if size == 16 or 8 * size <= place.length)
        sparse = self.n_heads - n_dense_heads
        self.layout: dict[str, Any] = {
            "block": fitting if block is None else block,
            "local_blocks": local_blocks,
            "vert_stride": max(1, sparse) if vert_stride is None else vert_stride,
            "n_dense_heads": n_dense_heads,
        }
        S2Layout(place.length, place.length, self.n_heads, self.n_heads, **self.layout)  # which checks the sizes

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Listed blocks only; what is shorter than a block is seen whole."""
        if q.shape[2] < self.layout["block"]:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        z = s2_attention(q, k, v, **self.layout)
        assert isinstance(z, Tensor)
        return z


def _blocks(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """The weight of each block; of a sequence that is shorter than one there is none."""
    if not isinstance(pattern, S2Pattern):
        return {}
    return {"blocks": by_blocks(pattern.dense()[0], pattern.layout.block)}


S2 = register(
    Mechanism(
        "s2",
        Card(
            title="S2-Attention: sparsely sharded attention",
            arxiv="2407.17678",
            equation="A = softmax(q kᵀ/√d) where I − J < L or (J + h·t) mod v = 0, of blocks I of queries, J of keys",
            map="A masked softmax.",
            kind="self",
            grade="exact",
            cost="O(n²/v + n·L·block) time, O(n) memory",
            causal="always",
            code="linxihui/dkernel, MIT.",
            claims=(
                Claim("Models with it reach the loss of models with dense attention."),
                Claim("A few dense heads find a needle over the whole length."),
                Claim("A head keeps a share of about 1/v of the cache."),
            ),
        ),
        S2Attention,
        variants={"one dense head": {"n_dense_heads": 1}, "stride 2": {"vert_stride": 2}},
        signature=Signature(
            "Which blocks each head sees",
            "Blocks of queries down, of keys across: what a query gives to the block, a mean over its own; grey "
            "blocks are never computed. From head to head the verticals move by one.",
            _blocks,
            rows="block of queries",
            columns="block of keys",
        ),
    )
)
