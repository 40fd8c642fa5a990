"""The map of RWKV's time mixing: a softmax over the past for each channel, whose scores fade with the distance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_finite
from workbench.kernels.history import own
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern


class WKVPattern(Pattern):
    """A[i, j] = exp(k_j − w (i − 1 − j)) / Σ for j < i, and exp(u + k_i) / Σ for j = i (RWKV-4, arXiv 2305.13048).

    The channels are the heads. Rows are positive and sum to one: they are attention that asks for nothing.

    Args:
        k: [batch, channel, position].
        rate: w, [channel], at least zero: how much a score falls with each position.
        bonus: u, [channel], added to the position's own score.
        values: [batch, channel, position, width], kept for `value_weighted`; optional.

    Raises:
        CaptureError: sizes that do not fit, inputs that are not finite, a rate below zero.

    >>> zero = torch.zeros(1)
    >>> WKVPattern(torch.zeros(1, 1, 2), zero, zero).dense()[0, 0].tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """

    def __init__(self, k: Tensor, rate: Tensor, bonus: Tensor, *, values: Tensor | None = None) -> None:
        if k.dim() != 3 or rate.shape != k.shape[1:2] or bonus.shape != rate.shape:
            raise CaptureError(
                f"k must be [batch, channel, position]; rate {list(rate.shape)}, bonus {list(bonus.shape)} [channel]",
                shape=k.shape,
            )
        for name, tensor in {"k": k, "rate": rate, "bonus": bonus}.items():
            check_finite(name, tensor)
        if bool((rate < 0).any()):
            raise CaptureError(f"a rate is {rate.min():.3g}, below zero", hint="pass exp(time_decay)")
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        b, h, n = k.shape
        super().__init__((b, h, n, n), Mask(n, n, causal=True), dtype, k.device)
        self.k, self.rate, self.bonus = own(k), own(rate), own(bonus)
        self.values = None if values is None else own(values)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """No facts; k, rate and bonus, and the values where they are kept."""
        tensors = {"k": self.k, "rate": self.rate, "bonus": self.bonus}
        return {}, tensors if self.values is None else tensors | {"values": self.values}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> WKVPattern:
        """The pattern from its `state`."""
        return cls(*(tensors[name] for name in ("k", "rate", "bonus")), values=tensors.get("values"))

    @cached_property
    def _scores(self) -> tuple[Tensor, Tensor]:
        """k_j + w j, which compares keys of the past in every row, and the own score on that scale; in float64."""
        at = torch.arange(self.n_keys, device=self.device, dtype=torch.float64)
        rate = self.rate.double()[:, None]
        past = self.k.double() + rate * at
        return past, self.k.double() + self.bonus.double()[:, None] + rate * (at - 1)

    @cached_property
    def _size(self) -> Tensor:
        """[batch, channel, query] log Σ of each row, on the scale of `_scores`."""
        past, own = self._scores
        before = past.logcumsumexp(-1).roll(1, -1)
        before[..., 0] = -torch.inf
        return torch.logaddexp(before, own)

    @property
    def lse(self) -> Tensor:
        """[batch, head, query] log of the denominator, of scores k_j − w (i − 1 − j)."""
        at = torch.arange(self.n_queries, device=self.device, dtype=torch.float64)
        return (self._size - self.rate.double()[:, None] * (at - 1)).to(self.dtype)

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A, in a fresh tensor."""
        which = list(range(self.n_heads)) if heads is None else self._checked(heads)
        past, own = (t[:, which] for t in self._scores)
        size = self._size[:, which, queries, None]
        away = torch.arange(queries.start, queries.stop, device=self.device)[:, None]
        away = away - torch.arange(keys.start, keys.stop, device=self.device)
        scores = torch.where(away == 0, own[:, :, None, keys], past[:, :, None, keys])
        return (scores - size).masked_fill_(away < 0, -torch.inf).to(self.dtype).exp_()
