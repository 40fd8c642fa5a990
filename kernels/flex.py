"""Softmax attention over listed blocks on FlexAttention, for CUDA: tokens in an order in which whole blocks are seen.

What is hidden is said by tensors alone, never by Python numbers, so that layouts and lengths share one compiled
kernel; key blocks of 64 take one of their own. Blocks that are seen as a whole are listed apart: for these no mask is
computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.flex_tiles import kernel_options
from workbench.kernels.layouts import listed

BLOCK = 128
"""Tokens in a block: FlexAttention's kernels work in tiles of up to 128."""
HALF = 64
"""Keys in a block where blocks of 128 would hold much that is not seen; the kernel's tiles are then of 64 keys too."""


@dataclass(frozen=True, eq=False)
class FlexPlan:
    """An order of tokens and the blocks that are visited in it.

    Attributes:
        mask: a FlexAttention `BlockMask` over places.
        queries: [place] the query at each place, −1 for padding; None if all are where they were.
        keys: [layout, place] the key at each place, −1 for padding; kv heads are split evenly among the layouts. None
            if all are where they were.
        places: [query] where each query lies; None as for `queries`.
        fewest: so many pairs of blocks are visited in any order of tokens; None if that is not known.
    """

    mask: Any
    queries: Tensor | None
    keys: Tensor | None
    places: Tensor | None
    fewest: int | None = None

    def __repr__(self) -> str:
        least = "" if self.fewest is None else f"; no order of tokens needs fewer than {self.fewest:,}"
        size = f"{BLOCK}" if self.key_block == BLOCK else f"{BLOCK} queries and {self.key_block} keys"
        return f"FlexPlan({self.n_visited:,} pairs of blocks of {size} visited{least})"

    @property
    def key_block(self) -> int:
        """Keys in a block, 128 or 64."""
        return int(self.mask.BLOCK_SIZE[1])

    @property
    def n_visited(self) -> int:
        """Pairs of a block of 128 queries and a block of keys that are visited, over all layouts."""
        full = self.mask.full_kv_num_blocks
        return int(self.mask.kv_num_blocks.sum() + (0 if full is None else full.sum()))

    def queries_at_places(self, q: Tensor) -> Tensor:
        """[batch, head, place, d] of [batch, head, query, d]; padding holds any query."""
        return q if self.queries is None else q.index_select(2, self.queries.clamp(min=0))

    def keys_at_places(self, x: Tensor) -> Tensor:
        """[batch, kv head, place, d] of keys or values [batch, kv head, key, d]; padding holds any key."""
        if self.keys is None:
            return x
        index = self.keys.clamp(min=0)
        if len(index) == 1:
            return x.index_select(2, index[0])
        index = index.repeat_interleave(x.shape[1] // len(index), dim=0)
        return x.gather(2, index[None, :, :, None].expand(len(x), -1, -1, x.shape[-1]))

    def at_queries(self, found: Tensor) -> Tensor:
        """[batch, head, query, ...] of what was found for each place."""
        return found if self.places is None else found.index_select(2, self.places)

    def to(self, device: torch.device) -> FlexPlan:
        """The plan with its tensors on a device; those of the mask's function have to be there already."""
        queries, keys, places = (None if x is None else x.to(device) for x in (self.queries, self.keys, self.places))
        return replace(self, mask=self.mask.to(device), queries=queries, keys=keys, places=places)


def block_mask(
    seen: Tensor, whole: Tensor, mask_mod: Callable[..., Tensor], lengths: tuple[int, int], key_block: int = BLOCK
) -> Any:
    """A `BlockMask` of blocks [head, query block, key block]: those seen in part, and those seen as a whole.

    It is made where the blocks are: on a device in a few launches.

    Args:
        seen: bool, whether some query of the block sees some key of it; whole: whether every one sees all.
        mask_mod: which places see which, `f(batch, head, query, key)`.
        lengths: places of queries and of keys.
        key_block: keys in a block.
    """
    from torch.nn.attention.flex_attention import BlockMask

    (n_part, part), (n_whole, full) = _lists(seen & ~whole), _lists(whole)
    (n_part_of_keys, part_of_keys), (n_whole_of_keys, full_of_keys) = _lists((seen & ~whole).mT), _lists(whole.mT)
    return BlockMask(
        seq_lengths=lengths,
        kv_num_blocks=n_part, kv_indices=part, full_kv_num_blocks=n_whole, full_kv_indices=full,
        q_num_blocks=n_part_of_keys, q_indices=part_of_keys,
        full_q_num_blocks=n_whole_of_keys, full_q_indices=full_of_keys,
        BLOCK_SIZE=(BLOCK, key_block), mask_mod=mask_mod,
    )  # fmt: skip


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of blocks has, and which, [1, head, row(, block)] int32."""
    order, counts = listed(blocks)
    return counts[None], order.clamp_(max=blocks.shape[-1] - 1)[None]


def flex_attend(
    q: Tensor, k: Tensor, v: Tensor, plan: FlexPlan, scale: float | None = None, compiled: bool = True
) -> tuple[Tensor, Tensor]:
    """As `blocked.attend`, on FlexAttention, with a plan on the device of q.

    Args:
        compiled: False for FlexAttention's eager mode, which builds the whole map: for tests. On the CPU its compiled
            mode does not give the log-sum-exp.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    d, width = q.shape[-1], v.shape[-1]
    block = plan.key_block
    tiles = kernel_options(d, width, q.dtype, q.device, block) if compiled and q.is_cuda else {}
    attend = _attend(compiled, q.dtype, d, width, block, q.shape[1] != k.shape[1], scale, learns, tuple(tiles.items()))
    out, lse = attend(plan.queries_at_places(q), plan.keys_at_places(k), plan.keys_at_places(v), plan.mask)
    return plan.at_queries(out), plan.at_queries(lse)


@lru_cache(maxsize=32)
def _attend(
    compiled: bool, dtype: torch.dtype, d: int, width: int, key_block: int, grouped: bool, scale: float | None,
    learns: bool, tiles: tuple[tuple[str, Any], ...],
) -> Callable[..., Any]:  # fmt: skip
    """FlexAttention for what its kernel is compiled for; all lengths, heads and layouts share one."""
    from torch.nn.attention import flex_attention as flex

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": grouped}
        options["kernel_options"] = dict(tiles)
        if hasattr(flex, "AuxRequest"):  # the newer way to ask for the log-sum-exp; the older one warns there
            out, aux = flex.flex_attention(q, k, v, return_aux=flex.AuxRequest(lse=True), **options)
            return out, aux.lse
        found: tuple[Tensor, Tensor] = flex.flex_attention(q, k, v, return_lse=True, **options)
        return found

    if not compiled:
        return call
    # Code of its own, since the compiler counts its attempts by code object: at the eighth it would go on eagerly.
    own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    return torch.compile(own)
