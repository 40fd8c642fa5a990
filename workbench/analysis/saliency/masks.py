"""Streams of masks: mask number m is the same whoever draws it and in whatever batch; or every mask there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workbench.errors import WorkbenchError

MOST_ENUMERATED = 12
"""Segments up to which all masks are enumerated: 2^12 = 4096."""


@dataclass(frozen=True)
class Draw:
    """Some masks of one granularity.

    Attributes:
        granularity: which segments. hidden: [mask, segment] True where masked.
        tokens: [mask, output token] True where a previous output token is masked; None if that is off.
        weights: [mask] of each mask in the sums.
    """

    granularity: int
    hidden: Tensor
    weights: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Masks:
    """Masks over segments at several granularities.

    Attributes:
        sizes: segments of each granularity. p: probability of masking one. seed: of the stream.
        n_tokens, p_tokens: output tokens, and the probability of masking one of those that were given back.
        exact: every mask once, weighted with its probability, instead of a stream.
    """

    sizes: tuple[int, ...]
    p: float
    seed: int
    n_tokens: int = 0
    p_tokens: float = 0.0
    exact: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1 or not 0 <= self.p_tokens < 1:
            raise WorkbenchError(f"p is a probability, not {self.p} (for previous tokens {self.p_tokens})")
        if self.exact and max(self.sizes) > MOST_ENUMERATED:
            raise WorkbenchError(
                f"{max(self.sizes)} segments have too many masks to enumerate, {MOST_ENUMERATED} are the most",
                hint="pass fewer segments, or exact=False",
            )

    @property
    def enumerated(self) -> int:
        """How many masks an enumeration has; those that hide nothing are left out."""
        return sum(2**n - 1 for n in self.sizes)

    def at(self, m: int) -> Draw:
        """Mask number m of the stream; granularities take turns."""
        granularity = m % len(self.sizes)
        random = np.random.Generator(np.random.Philox(key=[self.seed, m]))
        hidden = torch.from_numpy(random.random(self.sizes[granularity]) < self.p)
        tokens = None
        if self.p_tokens:
            tokens = torch.from_numpy(random.random(self.n_tokens) < self.p_tokens)[None]
        return Draw(granularity, hidden[None], torch.ones(1, dtype=torch.float64), tokens)

    def chunks(self, start: int, stop: int, size: int) -> Iterator[list[Draw]]:
        """Masks start … stop − 1, `size` at a time; those of one granularity together."""
        for begin in range(start, stop, size):
            numbers = range(begin, min(begin + size, stop))
            yield self._together([self._listed(m) if self.exact else self.at(m) for m in numbers])

    def _listed(self, m: int) -> Draw:
        """Mask number m of the enumeration."""
        granularity = 0
        while m >= 2 ** self.sizes[granularity] - 1:
            m -= 2 ** self.sizes[granularity] - 1
            granularity += 1
        n = self.sizes[granularity]
        hidden = torch.tensor([bool((m + 1) >> i & 1) for i in range(n)])
        k = int(hidden.sum())
        weight = torch.tensor([self.p**k * (1 - self.p) ** (n - k)], dtype=torch.float64)
        return Draw(granularity, hidden[None], weight)

    def _together(self, draws: list[Draw]) -> list[Draw]:
        found = []
        for granularity in range(len(self.sizes)):
            mine = [one for one in draws if one.granularity == granularity]
            if mine:
                tokens = [one.tokens for one in mine if one.tokens is not None]
                found.append(
                    Draw(
                        granularity,
                        torch.cat([one.hidden for one in mine]),
                        torch.cat([one.weights for one in mine]),
                        torch.cat(tokens) if tokens else None,
                    )
                )
        return found
