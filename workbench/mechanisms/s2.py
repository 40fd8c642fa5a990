"""S2-Attention: each head sees nearby blocks and every v-th block further back, shifted from head to head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.checks import check_range
from workbench.kernels.patterns import Pattern
from workbench.kernels.s2 import S2Cache, S2Layout, S2Pattern, Shards, s2_attention
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, by_blocks, register


class S2Attention(Mixer):
    """Softmax attention over local blocks, and over verticals that together cover the whole past, or over shards.

    Args:
        place: a causal sequence.
        block: tokens in a block, a power of two from 16 on; the largest up to 64 that fits eight times if None.
        local_blocks: blocks up to the query's own that are seen whole. vert_stride: of the others, each that many-th is
            seen; as many as heads that are not dense if None, so that the heads together see all.
        n_dense_heads: last heads that see everything.
        shards: for each head the numbers of the blocks that it sees wherever it stands, or None for a head that sees
            everything; in the place of verticals.

    Raises:
        WorkbenchError: a size out of range, shards that are no lists of blocks of this place; its message names it.

    >>> from workbench import mechanisms
    >>> place = Place(32, 4, 128)
    >>> layer = mechanisms.get("s2").build(place, shards=[[0, 4], [1, 5], [2, 3, 6, 7], None])
    >>> layer.kept(128)  # of 128 tokens, with one local block of 16
    (48, 48, 64, 128)
    """

    def __init__(
        self,
        place: Place,
        block: int | None = None,
        local_blocks: int = 1,
        vert_stride: int | None = None,
        n_dense_heads: int = 0,
        shards: Shards | None = None,
    ) -> None:
        super().__init__(place)
        fitting = max(size for size in (16, 32, 64) if size == 16 or 8 * size <= place.length)
        self.layout: dict[str, Any] = {
            "block": fitting if block is None else block,
            "local_blocks": local_blocks,
            "n_dense_heads": n_dense_heads,
            "shards": shards,
        }
        if vert_stride is not None:
            self.layout["vert_stride"] = vert_stride
        elif shards is None:
            check_range("n_dense_heads", n_dense_heads, 0, self.n_heads)
            self.layout["vert_stride"] = max(1, self.n_heads - n_dense_heads)
        whole = S2Layout(place.length, place.length, self.n_heads, self.n_heads, **self.layout)  # which checks them
        for head, shard in enumerate(whole.shards or ()):
            last = -(-place.length // whole.block) - 1
            if shard and shard[-1] > last:
                raise WorkbenchError(
                    f"the shard of head {head} names block {shard[-1]}, and {place.length} tokens have 0 to {last}",
                    hint=f"blocks are of {whole.block} tokens",
                )

    def cache(self) -> S2Cache:
        """An empty cache, which keeps what some later query of a head may see."""
        return S2Cache(self.n_heads, self.n_heads, **self.layout)

    def kept(self, length: int) -> tuple[int, ...]:
        """Of the keys of so many tokens, how many a cache keeps for each head."""
        check_range("length", length, 1, self.place.length)
        cache, nothing = self.cache(), torch.empty(1, self.n_heads, length, 0)
        cache.extend(nothing, nothing)
        return cache.kept

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
            equation="A = softmax(q kᵀ/√d) where I − J < L, or (J + h·t) mod v = 0, or J is in the shard of head h, "
            "of blocks I of queries and J of keys",
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
                Claim("At a sparsity of 90 % a long prompt takes a small part of dense attention's time."),
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
