"""The map that scan attention applies: a causal softmax whose scores are the same in every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention, check_number
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern
from workbench.kernels.plan import Pass
from workbench.kernels.scan.blocked import prefix_sums, suffix_sums
from workbench.kernels.scan.operator import Sums
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.source import TileMaker
from workbench.kernels.statistics import Options
from workbench.kernels.tile import BITS, LOG_FLOOR, Space

_HIDDEN = -1e30
_BLOCK = 128


def check_scan(q: Tensor, k: Tensor, v: Tensor | None = None) -> Tensor:
    """The query for every batch entry, [batch, head, 1, d]; see `scan_attention` for what is checked."""
    if q.dim() == 4 and q.shape[2] != 1:
        raise CaptureError(
            f"scan attention has one query per head, and q has {q.shape[2]} rows",
            shape=q.shape,
            hint="pass [batch or 1, head, 1, d]; for a query per position use causal softmax attention",
        )
    if q.dim() == 4 and k.dim() == 4 and q.shape[0] == 1:
        q = q.expand(k.shape[0], -1, -1, -1)
    check_attention(q, k, v)
    return q


def scores_of(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """[batch, head, position] scale · q·k_j in float32, float64 for float64 inputs; q [batch, head, 1, d]."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.to(dtype).unflatten(1, (k.shape[1], -1)).squeeze(3)  # [batch, kv head, group, d]
        return (grouped @ k.to(dtype).transpose(-1, -2)).flatten(1, 2) * scale


class ScanPattern(Pattern):
    """A[t, j] = exp(s_j − Z_t) for j ≤ t, where Z_t is the log-sum-exp of s_0..s_t (Aaren, arXiv 2405.13956).

    The map is [batch, head, position, position] although there is one query: row t is attention over the prefix that
    ends at t. Two vectors per head say all of it: how two keys compare never depends on the row.

    Args:
        q: [batch or 1, head, 1, d], the learned query of each head.
        k: [batch, kv head, position, d]; heads are a multiple of kv heads.
        scale: factor on q·k; 1/√d if None.
        values: [batch, kv head, position, width], kept for `value_weighted`; optional.

    Raises:
        CaptureError: more than one query row, sizes that do not fit, inputs that are not finite.

    >>> ScanPattern(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4)).dense()[0, 0].tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float | None = None, *, values: Tensor | None = None) -> None:
        wide = check_scan(q, k)
        n, dtype = k.shape[2], torch.float64 if q.dtype == torch.float64 else torch.float32
        super().__init__((k.shape[0], q.shape[1], n, n), Mask(n, n, causal=True), dtype, k.device)
        self.n_kv_heads = k.shape[1]
        self.q, self.k, self.values = q.detach(), k.detach(), None if values is None else values.detach()
        self.scale = wide.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The scale; q and k, and the values where they are kept."""
        tensors = {"q": self.q, "k": self.k}
        return {"scale": self.scale}, tensors if self.values is None else tensors | {"values": self.values}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> ScanPattern:
        """The pattern from its `state`."""
        return cls(tensors["q"], tensors["k"], facts["scale"], values=tensors.get("values"))

    @cached_property
    def scores(self) -> Tensor:
        """[batch, head, key]: the score of each key, the same for every row that sees it."""
        return scores_of(self.q.expand(self.n_batch, -1, -1, -1), self.k, self.scale)

    @property
    def as_softmax(self) -> SoftmaxPattern:
        """The same as a causal softmax over what is added to each key's score, for engines that fuse one."""
        anything = self.scores[..., None]  # of which nothing is left at a scale of zero
        lse = self.scores.logcumsumexp(-1)
        return SoftmaxPattern(anything, anything, self.mask, scale=0.0, key_bias=self.scores, lse=lse)

    def collect(self, each: Pass, options: Options) -> dict[str, Tensor]:
        """The raw sums of one pass; on a device by the engines of softmaxes, in a few launches."""
        return super().collect(each, options) if self.device.type == "cpu" else self.as_softmax.collect(each, options)

    def engines(self, names: Sequence[str], options: Options) -> set[str]:
        """Who streams these statistics."""
        return super().engines(names, options) if self.device.type == "cpu" else self.as_softmax.engines(names, options)

    def unfused(self, names: Sequence[str], options: Options) -> str | None:
        """Why plain torch streams some of these."""
        return super().unfused(names, options) if self.device.type == "cpu" else self.as_softmax.unfused(names, options)

    def space(self) -> Space:
        """As the base does; every row sees its own key."""
        return replace(super().space(), all_see=True)

    def check(self) -> None:
        """As the base does; on a device the scores tell of queries and keys, without reading them."""
        if self.device.type == "cpu":
            super().check()

    @cached_property
    def _prefixes(self) -> tuple[Tensor, Tensor]:
        """The largest score m of each prefix and log Σ exp(s − m), [batch, head, query]."""
        sums = prefix_sums(self.scores, self.scores.new_zeros(*self.scores.shape, 0), _BLOCK)
        return sums.top, sums.size.log()

    @property
    def lse(self) -> Tensor:
        """[batch, head, query] log of the softmax denominator of each prefix."""
        return self._prefixes[0] + self._prefixes[1]

    def _log_tile(self, queries: slice, keys: slice, batch: slice, heads: slice | list[int]) -> Tensor:
        """ln A for a tile, [b, h, q, k]; hidden keys are very negative. No entry is above zero."""
        scores, top, log_size = (t[batch][:, heads] for t in (self.scores, *self._prefixes))
        tile = scores[:, :, None, keys] - top[:, :, queries, None]
        tile -= log_size[:, :, queries, None]
        rule = self.mask.rule(queries, keys, self.device)
        return tile if rule is None else tile.masked_fill_(~rule, _HIDDEN)

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of the pattern, in a fresh tensor."""
        which = list(range(self.n_heads)) if heads is None else self._checked(heads)
        return self._log_tile(queries, keys, slice(None), which).exp_()

    def maker(self, batch: slice, heads: slice, wants_log: bool) -> TileMaker:
        """Tiles of weights by outer differences of the scores and the prefixes' sums."""

        def make(queries: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
            log_p = self._log_tile(queries, keys, batch, heads).mul_(BITS).clamp_(min=LOG_FLOOR[self.dtype])
            return (log_p.exp2(), log_p) if wants_log else (log_p.exp2_(), None)

        return make

    def received(self) -> Tensor:
        """[batch, head, key] Σ_t A[t, j] = exp(s_j) · Σ_{t≥j} exp(−Z_t), in O(N); `statistics` streams the map for it.

        >>> ScanPattern(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4)).received().tolist()
        [[[1.5, 0.5]]]
        """
        top, log_size = self._prefixes
        ones = torch.ones(*self.shape[:3], 1, dtype=self.dtype, device=self.device)
        own = ((self.scores - top) - log_size).exp_()
        return suffix_sums(top, log_size, ones, _BLOCK).squeeze(-1) * own

    def entropy(self) -> Tensor:
        """[batch, head, query] Z_t − Σ_j A[t, j] s_j in nats, in O(N); in float64, since large scores cancel.

        >>> ScanPattern(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4)).entropy().exp().tolist()
        [[[1.0, 2.0]]]
        """
        scores = self.scores.double()
        sums: Sums = prefix_sums(scores, scores[..., None], _BLOCK)
        found = sums.size.log() + (sums.top - sums.output.squeeze(-1))
        return found.clamp_(min=0).to(self.dtype)
