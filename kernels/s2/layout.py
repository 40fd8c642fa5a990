"""The S2 layout: each kv head sees some local blocks and every so many-th block before them, shifted head by head.

Or, in the place of these verticals, a shard: blocks that are named for each head. S2-Attention, arXiv 2407.17678; the
rules of verticals are those of its kernel library, DKernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import LARGEST, check_range
from workbench.kernels.layouts import Layout

Shards = Sequence[Sequence[int] | None]
_OF_VERTICALS = ("vert_stride", "head_step", "head_offset", "n_dense_heads", "homogeneous")


@dataclass(frozen=True)
class S2Layout(Layout):
    """Local blocks and verticals.

    With I, J the block indices of query and key and h the kv head, a causal head sees block J <= I if I − J <
    local_blocks or (J + h · head_step + head_offset) mod vert_stride = 0. A bidirectional head measures its verticals
    from the edge of the local blocks: with l = max(0, I − J − left + 1) and r = max(0, J − I − right + 1), it sees
    block J if (l + r) mod vert_stride = 0; heads are not shifted. With shards a head sees its local blocks and those of
    its shard.

    Attributes:
        n_queries, n_keys: tokens; in the causal form, the queries are the last ones.
        n_heads, n_kv_heads: query heads share the layout of their kv head.
        block: tokens in a block, a power of two and at least 16.
        local_blocks: local blocks with the query's own; (left, right) for the bidirectional form.
        vert_stride: blocks from one vertical to the next; 1 is dense.
        head_step: shift of the verticals from one kv head to the next; max(1, vert_stride // n_heads) if None.
        head_offset: shift of the verticals of kv head 0.
        n_dense_heads: so many kv heads, the last ones, see everything.
        homogeneous: all kv heads have the verticals of kv head 0.
        causal: the causal form.
        shards: for each kv head the numbers of the blocks that it sees wherever they lie, in ascending order, or None
            for a head that sees everything; in the place of verticals. A number beyond the last block is of a block
            that is not there yet.

    Raises:
        CaptureError: a number out of range, a shard that is no such list, shards and options of verticals; the message
            names it.

    >>> S2Layout(64, 64, 2, 2, block=16, local_blocks=1, vert_stride=2).blocks().int().tolist()[1]
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    """

    n_queries: int
    n_keys: int
    n_heads: int
    n_kv_heads: int
    block: int = 64
    local_blocks: int | tuple[int, int] = 4
    vert_stride: int = 8
    head_step: int | None = None
    head_offset: int = 0
    n_dense_heads: int = 0
    homogeneous: bool = False
    causal: bool = True
    shards: tuple[tuple[int, ...] | None, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("n_queries", "n_keys", "n_heads", "n_kv_heads", "block", "vert_stride", "head_offset"):
            check_range(name, getattr(self, name), -LARGEST, LARGEST)
        for name, value in (("head_step", self.head_step or 0), ("n_dense_heads", self.n_dense_heads)):
            check_range(name, value, -LARGEST, LARGEST)
        for name in ("homogeneous", "causal"):
            if not isinstance(getattr(self, name), bool):
                raise CaptureError(f"{name} is True or False, not {getattr(self, name)!r}")
        if self.block < 16 or self.block & (self.block - 1):
            raise CaptureError(f"block={self.block} is not a power of two from 16 up", hint="64 is a good start")
        if isinstance(self.local_blocks, Sequence):
            object.__setattr__(self, "local_blocks", tuple(self.local_blocks))  # a list, when read from a file
            if self.causal or len(self.local_blocks) != 2:
                raise CaptureError(
                    f"local_blocks={list(self.local_blocks)} is (left, right) of the bidirectional form",
                    hint="pass one number, or causal=False",
                )
        for value in self.local_sides:
            check_range("local_blocks", value, -LARGEST, LARGEST)
        if min(self.local_sides) < 1:
            raise CaptureError(f"local_blocks={self.local_blocks} is below 1", hint="1 is the query's own block")
        if self.vert_stride < 1:
            raise CaptureError(f"vert_stride={self.vert_stride} is below 1", hint="1 is dense attention")
        if self.head_step is not None and self.head_step < 0:
            raise CaptureError(f"head_step={self.head_step} is negative", hint="homogeneous=True gives no shift")
        if self.n_kv_heads < 1 or self.n_heads < 1 or self.n_heads % self.n_kv_heads:
            raise CaptureError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if not 0 <= self.n_dense_heads <= self.n_kv_heads:
            raise CaptureError(f"n_dense_heads={self.n_dense_heads} is not one of 0 to {self.n_kv_heads} kv heads")
        if self.n_queries > self.n_keys or (not self.causal and self.n_queries != self.n_keys):
            raise CaptureError(
                f"{self.n_queries} queries do not fit {self.n_keys} keys",
                hint="causal queries are the last keys, so that none sees nothing; bidirectional ones are all keys",
            )
        if self.shards is not None:
            object.__setattr__(self, "shards", self._checked_shards())

    def _checked_shards(self) -> tuple[tuple[int, ...] | None, ...]:
        given: Any = self.shards
        if odd := [f.name for f in fields(self) if f.name in _OF_VERTICALS and getattr(self, f.name) != f.default]:
            raise CaptureError(
                f"{odd[0]}={getattr(self, odd[0])} is of verticals, in whose place there are shards",
                hint="a head that sees everything has None for its shard",
            )
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != self.n_kv_heads:
            raise CaptureError(
                f"shards={given!r} is no list with one entry for each of {self.n_kv_heads} kv heads",
                hint="a list of block numbers for each kv head, or None for one that sees everything",
            )
        for head, shard in enumerate(given):
            if shard is None:
                continue
            if isinstance(shard, str) or not isinstance(shard, Sequence):
                raise CaptureError(f"the shard of kv head {head} is no list of blocks: {shard!r}", hint="[] for none")
            for block in shard:
                check_range(f"a block in the shard of kv head {head}", block, 0, LARGEST)
            if any(b <= a for a, b in pairwise(shard)):
                raise CaptureError(
                    f"the shard of kv head {head} names blocks twice or out of order: {list(shard)}",
                    hint="in ascending order, each once",
                )
        return tuple(None if shard is None else tuple(shard) for shard in given)

    @property
    def n_layouts(self) -> int:  # type: ignore[override]
        """One for each kv head, or 1 where all are alike."""
        if self.shards is not None:
            return 1 if len(set(self.shards)) == 1 else self.n_kv_heads
        alike = (self.homogeneous or not self.causal) and self.n_dense_heads in (0, self.n_kv_heads)
        return 1 if alike else self.n_kv_heads

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Where the queries of a block lie in one absolute block."""
        return self.offset % self.block == 0

    @property
    def offset(self) -> int:
        """Absolute position of query row 0."""
        return self.n_keys - self.n_queries

    @property
    def local_sides(self) -> tuple[int, int]:
        """Local blocks to the left and to the right, each with the query's own."""
        return self.local_blocks if isinstance(self.local_blocks, tuple) else (self.local_blocks,) * 2

    @property
    def step(self) -> int:
        """The shift from head to head, resolved."""
        if self.homogeneous:
            return 0
        return max(1, self.vert_stride // self.n_heads) if self.head_step is None else self.head_step

    def facts(self) -> dict[str, Any]:
        """What JSON needs to make the layout again."""
        return asdict(self)

    def sees(self, layouts: Tensor, query_blocks: Tensor, key_blocks: Tensor) -> Tensor:
        """Bool, broadcast, for absolute block indices: the rule of the class without the causal edge inside a block."""
        distance = query_blocks - key_blocks
        left, right = self.local_sides
        if self.shards is not None:
            found = self._in_shard(layouts, key_blocks) | ((distance < left) & (-distance < right))
        elif self.causal:
            vertical = (key_blocks + layouts * self.step + self.head_offset) % self.vert_stride == 0
            found = (distance < left) | vertical
        else:
            beyond = (distance - left + 1).clamp(min=0) + (1 - distance - right).clamp(min=0)
            found = beyond % self.vert_stride == 0
        if self.n_dense_heads:
            found = found | (layouts >= self.n_layouts - self.n_dense_heads)
        return found & (distance >= 0) if self.causal else found

    def _in_shard(self, layouts: Tensor, key_blocks: Tensor) -> Tensor:
        """Bool, broadcast: whether a layout's shard names a block."""
        assert self.shards is not None
        n = self.n_layouts
        dense = torch.tensor([shard is None for shard in self.shards[:n]], device=layouts.device)
        named = [block * n + at for at, shard in enumerate(self.shards[:n]) for block in shard or ()]
        listed = torch.tensor(named, dtype=torch.long, device=layouts.device)
        return torch.isin(key_blocks * n + layouts, listed) | dense[layouts]

    def absolute_blocks(self) -> Tensor:
        """[layout, I, J] bool for the blocks that queries lie in; those of a chunk start at `offset // block`."""
        rows = torch.arange(self.offset // self.block, -(-self.n_keys // self.block))
        columns = torch.arange(-(-self.n_keys // self.block))
        found = self.sees(torch.arange(self.n_layouts)[:, None, None], rows[:, None], columns)
        return found.expand(self.n_layouts, -1, -1)  # heads that are not shifted leave their dimension out

    def blocks(self) -> Tensor:
        """[layout, query block, key block] bool; a query block of a chunk may lie across two absolute blocks."""
        found = self.absolute_blocks()
        start = torch.arange(0, self.n_queries, self.block)
        last = (start + self.block).clamp(max=self.n_queries) - 1
        before = self.offset // self.block
        first, final = ((x + self.offset) // self.block - before for x in (start, last))
        return found[:, first] | found[:, final]

    def visible(self, queries: slice, keys: slice, layouts: Tensor) -> Tensor:
        """[len(layouts), q, k] bool, with the causal edge."""
        i = torch.arange(queries.start, queries.stop)[:, None] + self.offset
        j = torch.arange(keys.start, keys.stop)
        found = self.sees(layouts[:, None, None], i // self.block, j // self.block)
        return (found & (i >= j) if self.causal else found).expand(len(layouts), -1, -1)
