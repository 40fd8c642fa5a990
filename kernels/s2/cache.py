"""Decoding with S2-Attention from a cache that keeps only what each head will ever see again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention
from workbench.kernels.s2.layout import S2Layout


class S2Cache:
    """Keys and values of one layer: for each kv head its last `local_blocks` blocks and its verticals.

    A head keeps about local_blocks · block + N / vert_stride of N tokens.

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
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._positions: list[Tensor] = [torch.zeros(0, dtype=torch.long) for _ in range(n_kv_heads)]
        self.length = 0

    @property
    def kept(self) -> tuple[int, ...]:
        """Number of tokens that each kv head keeps, out of `length`."""
        return tuple(len(p) for p in self._positions)

    def extend(self, k: Tensor, v: Tensor) -> None:
        """Append tokens [batch, kv head, token, d] and evict what no later query, nor the last one, sees."""
        if k.dim() != 4 or k.shape[:3] != v.shape[:3] or k.shape[1] != self._layout.n_kv_heads:
            raise CaptureError(f"keys must be [batch, {self._layout.n_kv_heads}, token, d]", shape=k.shape)
        if not self._keys:
            self._keys = [k[:, h, :0] for h in range(k.shape[1])]
            self._values = [v[:, h, :0] for h in range(k.shape[1])]
        added = torch.arange(self.length, self.length + k.shape[2])
        self.length += k.shape[2]
        for h in range(k.shape[1]):
            self._positions[h] = torch.cat([self._positions[h], added])
            self._keys[h] = torch.cat([self._keys[h], k[:, h]], dim=1)
            self._values[h] = torch.cat([self._values[h], v[:, h]], dim=1)
            self._evict(h)

    def _evict(self, head: int) -> None:
        block = self._layout.block
        at = self._positions[head]
        now = torch.tensor((self.length - 1) // block)
        layout = torch.tensor(head if self._layout.n_layouts > 1 else 0)
        seen = self._layout.sees(layout, now, at // block)
        if not bool(seen.all()):
            self._positions[head] = at[seen]
            on_device = seen.to(self._keys[head].device)
            self._keys[head], self._values[head] = (x[head][:, on_device] for x in (self._keys, self._values))

    def attend(self, q: Tensor, scale: float | None = None) -> Tensor:
        """[batch, head, 1, width] for the query [batch, head, 1, d] of the last token."""
        if not self.length:
            raise CaptureError("the cache is empty", hint="extend it with the token's own key and value first")
        if q.dim() != 4 or q.shape[1] != self._layout.n_heads or q.shape[2] != 1:
            raise CaptureError(f"a decoded query is [batch, {self._layout.n_heads}, 1, d]", shape=q.shape)
        shared = self._layout.n_heads // self._layout.n_kv_heads
        outs = []
        for h, (k, v) in enumerate(zip(self._keys, self._values, strict=True)):
            rows = q[:, h * shared : (h + 1) * shared, 0]  # all that is kept is visible to the last token
            outs.append(F.scaled_dot_product_attention(rows, k, v, scale=scale))
        return torch.cat(outs, dim=1)[:, :, None]


def decode(q: Tensor, k: Tensor, v: Tensor, cache: S2Cache, scale: float | None = None) -> Tensor:
    """One step: append the token's key and value to the cache and attend from its query.

    Args:
        q: [batch, head, 1, d]; k: [batch, kv head, 1, d]; v: [batch, kv head, 1, width].
    """
    check_attention(q, k, v)
    cache.extend(k, v)
    return cache.attend(q, scale)
