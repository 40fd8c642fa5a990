"""Decoding with S2-Attention from a cache that keeps only what each head will ever see again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention
from workbench.kernels.history import learns, without_gradients
from workbench.kernels.s2.layout import S2Layout


class S2Cache:
    """Keys and values of one layer: for each kv head its last `local_blocks` blocks and its verticals.

    A head keeps about local_blocks · block + N / vert_stride of N tokens. They stand in buffers that a token is written
    into: a step takes a few operations on the device, however long the sequence and however many the heads, and none
    that the host waits for. What is kept has no autograd history: `backward` of what was attended to is an error.

    Args:
        n_heads, n_kv_heads: of the layer.
        options: block, local_blocks, vert_stride, head_step, head_offset, n_dense_heads, homogeneous, as in `S2Layout`.

    >>> cache = S2Cache(1, 1, block=16, local_blocks=1, vert_stride=4)
    >>> cache.extend(torch.zeros(1, 1, 80, 8), torch.zeros(1, 1, 80, 8))
    >>> cache.kept  # vertical blocks 0 and 4, and 4 is also the local one
    (32,)
    """

    def __init__(self, n_heads: int, n_kv_heads: int, **options: Any) -> None:
        self._layout = S2Layout(1, 1, n_heads, n_kv_heads, **options)
        if not self._layout.causal:
            raise CaptureError("only the causal form can decode from a cache", hint="leave causal=True")
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for head in range(n_kv_heads):
            alike[_need(self._layout, head)].append(head)
        self._stores = [_Store(self._layout, heads) for heads in alike.values()]
        self.length = 0
        self._forgets = False  # whether gradients would be expected to reach what is kept

    @property
    def kept(self) -> tuple[int, ...]:
        """Number of tokens that each kv head keeps, out of `length`."""
        block, left = self._layout.block, self._layout.local_sides[0]
        local = self.length - block * max(0, -(-self.length // block) - left)
        counts = {head: n for store in self._stores for head, n in zip(store.heads, store.counts, strict=True)}
        return tuple(local + block * counts[head] for head in range(self._layout.n_kv_heads))

    def extend(self, k: Tensor, v: Tensor) -> None:
        """Append tokens [batch, kv head, token, d] and evict what no later query, nor the last one, sees."""
        if k.dim() != 4 or k.shape[:3] != v.shape[:3] or k.shape[1] != self._layout.n_kv_heads:
            raise CaptureError(f"keys must be [batch, {self._layout.n_kv_heads}, token, d]", shape=k.shape)
        block, done = self._layout.block, 0
        self._forgets = self._forgets or learns(k, v)
        while done < k.shape[2]:
            at = self.length % block
            part = slice(done, min(done + block - at, k.shape[2]))
            for store in self._stores:
                store.write(self.length, k[:, :, part].detach(), v[:, :, part].detach())
            self.length += part.stop - done
            done = part.stop

    def attend(self, q: Tensor, scale: float | None = None) -> Tensor:
        """[batch, head, 1, width] for the query [batch, head, 1, d] of the last token.

        Its `backward`, where the query or anything that was kept asks for gradients, is a CaptureError.
        """
        if not self.length:
            raise CaptureError("the cache is empty", hint="extend it with the token's own key and value first")
        if q.dim() != 4 or q.shape[1] != self._layout.n_heads or q.shape[2] != 1:
            raise CaptureError(f"a decoded query is [batch, {self._layout.n_heads}, 1, d]", shape=q.shape)
        if not (self._forgets or learns(q)):
            return self._attend(q, scale)
        hint = "take s2_attention over the whole sequence, or decode under torch.no_grad()"
        return without_gradients(self._attend(q, scale), "a cache for decoding keeps keys without their history", hint)

    def _attend(self, q: Tensor, scale: float | None) -> Tensor:
        rows = q.reshape(q.shape[0], self._layout.n_kv_heads, -1, q.shape[3])  # query heads of a kv head are its rows
        if len(self._stores) == 1:
            return self._stores[0].attend(rows, scale).reshape(*q.shape[:3], -1)
        parts = [(store.heads, store.attend(rows[:, store.heads], scale)) for store in self._stores]
        order = sorted((head, i, at) for i, (heads, _) in enumerate(parts) for at, head in enumerate(heads))
        return torch.stack([parts[i][1][:, at] for _, i, at in order], dim=1).reshape(*q.shape[:3], -1)


def _need(layout: S2Layout, head: int) -> Hashable:
    """What is the same for heads that keep about as much, so that one buffer fits them."""
    at = head if layout.n_layouts > 1 else 0
    if layout.shards is not None:
        shard = layout.shards[at]
        return None if shard is None else len(shard)
    return at >= layout.n_layouts - layout.n_dense_heads


class _Store:
    """What some kv heads keep: a ring of local blocks, and behind it the verticals of each.

    Attributes:
        heads: which they are. counts: how many blocks of verticals each has.
    """

    def __init__(self, layout: S2Layout, heads: list[int]) -> None:
        self.heads, self.counts = heads, [0] * len(heads)
        self._layout, self._block, self._left = layout, layout.block, layout.local_sides[0]
        self._ring = self._left * self._block
        self._buffers: tuple[Tensor, Tensor] | None = None  # keys, values: [batch, head, place, d]
        self._shown = torch.zeros(0)  # [head, place] bool: there is something

    def write(self, position: int, k: Tensor, v: Tensor) -> None:
        """Tokens [batch, kv head, token, d] of one block, whose first has this position."""
        if self._buffers is None:
            self._grow(k, v, self._ring)
        assert self._buffers is not None
        number, at = divmod(position, self._block)
        if at == 0 and number >= self._left:
            self._retire(number - self._left)
        start = number % self._left * self._block + at
        places = slice(start, start + k.shape[2])
        for buffer, given in zip(self._buffers, (k, v), strict=True):
            buffer[:, :, places] = given if len(self.heads) == given.shape[1] else given[:, self.heads]
        self._shown[:, places] = True

    def attend(self, rows: Tensor, scale: float | None) -> Tensor:
        """[batch, head, row, width] for rows [batch, head, row, d] of the last token, to which all that is kept is
        visible.
        """
        assert self._buffers is not None
        used = self._ring + self._block * max(self.counts)
        k, v = (buffer[:, :, :used] for buffer in self._buffers)
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=self._shown[None, :, None, :used], scale=scale)

    def _retire(self, number: int) -> None:
        """A block is local no more: it goes behind the ring for heads of which it is a vertical."""
        assert self._buffers is not None
        layouts = torch.tensor(self.heads if self._layout.n_layouts > 1 else [0] * len(self.heads))
        seen = self._layout.sees(layouts, torch.tensor(number + self._left), torch.tensor(number))
        keep = [at for at, one in enumerate(seen.expand(len(self.heads)).tolist()) if one]
        here = slice(number % self._left * self._block, (number % self._left + 1) * self._block)
        self._shown[:, here] = False
        if not keep:
            return
        if self._ring + self._block * (max(self.counts[at] for at in keep) + 1) > self._shown.shape[1]:
            self._grow(*self._buffers, self._ring + 2 * (self._shown.shape[1] - self._ring) + self._block)
        heads = torch.tensor(keep)[:, None]
        places = torch.tensor([self._ring + self._block * self.counts[at] for at in keep])[:, None]
        places = places + torch.arange(self._block)
        heads, places = heads.to(self._shown.device), places.to(self._shown.device)
        for buffer in self._buffers:
            buffer[:, heads, places] = buffer[:, heads[:, 0], here]
        self._shown[heads, places] = True
        for at in keep:
            self.counts[at] += 1

    def _grow(self, k: Tensor, v: Tensor, places: int) -> None:
        with torch.inference_mode(False):  # a buffer of that mode could not be written to outside
            held = [x.new_zeros(x.shape[0], len(self.heads), places, x.shape[3]) for x in (k, v)]
            shown = torch.zeros(len(self.heads), places, dtype=torch.bool, device=k.device)
            if self._buffers is not None:
                n = self._shown.shape[1]
                shown[:, :n] = self._shown
                for new, old in zip(held, self._buffers, strict=True):
                    new[:, :, :n] = old
        self._buffers, self._shown = (held[0], held[1]), shown


def decode(q: Tensor, k: Tensor, v: Tensor, cache: S2Cache, scale: float | None = None) -> Tensor:
    """One step: append the token's key and value to the cache and attend from its query.

    Args:
        q: [batch, head, 1, d]; k: [batch, kv head, 1, d]; v: [batch, kv head, 1, width].
    """
    check_attention(q, k, v)
    cache.extend(k, v)
    return cache.attend(q, scale)
