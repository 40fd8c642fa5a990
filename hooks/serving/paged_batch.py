"""What heads do in one step of a server: each request's queries against the keys that its pages hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.masks import Mask
from workbench.kernels.softmax import SoftmaxPattern


@dataclass(frozen=True)
class Served:
    """A request in one step of a server.

    Attributes:
        request: its row in the batch. blocks: the pages that hold its keys, in order.
        start: position of its first query in this step; the last one's is `n_keys` − 1.
        heads: which heads.
        row: [head, key] weights of its last query, which the next token is written from.
        statistics: by name, [head, query] over this step's queries.
    """

    request: int
    blocks: tuple[int, ...]
    start: int
    n_keys: int
    heads: tuple[int, ...]
    row: Tensor
    statistics: dict[str, Tensor]


@dataclass(frozen=True)
class PagedBatch:
    """One call of an attention kernel over a continuous batch with a paged cache.

    Attributes:
        query: [token, head, d_head] of all requests, one behind the other.
        keys: [block, slot, kv head, d_head] a view of the cache, this step's keys in it.
        starts: [request + 1] where each request's queries begin, and the last ones end.
        n_keys: [request] how many keys each has, those of this step among them.
        table: [request, block] the pages of each request.
        scale: factor on q kᵀ. window: a query sees fewer positions back than this; None for no limit.
        softcap: scores become softcap · tanh(score / softcap). sinks: [head] logits of the denominator only.
        slopes: [head] of ALiBi.
    """

    query: Tensor
    keys: Tensor
    starts: Tensor
    n_keys: Tensor
    table: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None

    def served(self, heads: Sequence[int], statistics: Sequence[str] = ()) -> Iterator[Served]:
        """What these heads do for each request; nothing else is computed, and no page is read but the requests' own.

        Raises:
            CaptureError: there is no such head, or tensors do not fit each other.
        """
        self._check(heads)
        block_size, starts = self.keys.shape[1], self.starts.tolist()
        for request, n_keys in enumerate(self.n_keys.tolist()):
            start, stop = starts[request : request + 2]
            if stop == start or n_keys == 0:
                continue  # a row of the batch that nobody uses
            blocks = self.table[request, : -(-n_keys // block_size)]
            pattern = self.pattern(slice(start, stop), blocks, n_keys, heads)
            found = pattern.statistics(statistics) if statistics else {}
            yield Served(
                request, tuple(blocks.tolist()), n_keys - (stop - start), n_keys, tuple(heads),
                pattern.rows(-1)[0, :, 0], {name: value[0] for name, value in found.items()},
            )  # fmt: skip

    def pattern(self, queries: slice, blocks: Tensor, n_keys: int, heads: Sequence[int]) -> SoftmaxPattern:
        """The map [1, head, query, key] of these heads of one request."""
        which = torch.as_tensor(list(heads), device=self.query.device)
        group = self.query.shape[1] // self.keys.shape[2]
        keys = self.keys[blocks.long()][:, :, which // group].flatten(0, 1)[:n_keys]  # [key, head, d_head]
        n_queries = queries.stop - queries.start
        bias = None
        if self.slopes is not None:  # slope · (j − i): what all keys of a row share changes nothing
            at = torch.arange(n_keys, device=self.query.device) - (n_keys - 1)
            bias = (self.slopes[which].float()[:, None] * at)[None]
        return SoftmaxPattern(
            self.query[queries][:, which].transpose(0, 1)[None],
            keys.to(self.query.dtype).transpose(0, 1)[None],
            Mask(n_queries, n_keys, causal=True, offset=n_keys - n_queries, window=self.window),
            scale=self.scale, softcap=self.softcap, key_bias=bias,
            sinks=None if self.sinks is None else self.sinks[which],
        )  # fmt: skip

    def _check(self, heads: Sequence[int]) -> None:
        n_heads, n_kv_heads = self.query.shape[1], self.keys.shape[2]
        bad = [head for head in heads if not 0 <= head < n_heads]
        if bad or not heads:
            raise CaptureError(f"there are {n_heads} heads, no head {bad[0]}" if bad else "no head was chosen")
        if n_heads % n_kv_heads or self.query.shape[2] != self.keys.shape[3]:
            raise CaptureError("queries and keys do not fit each other", shape=self.keys.shape)
        if len(self.starts) != len(self.n_keys) + 1 or len(self.table) < len(self.n_keys):
            raise CaptureError("starts, lengths and pages are of different numbers of requests")
