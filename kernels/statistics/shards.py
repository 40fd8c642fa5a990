"""What the merging of shards of the keys is written on: the statistics of every shard, and what each weighs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Shards:
    """Row statistics over shards of the keys, `lse` among them.

    Attributes:
        lse: [shard, batch, head, query] of each shard; whole: [batch, head, query] of all of them.
        weight: [shard, batch, head, query] share of a row's mass that lies in each shard.
        dead: [batch, head, query] bool: rows that see no key.
        starts: the position of each shard's first key.
    """

    def __init__(self, shards: Sequence[dict[str, Tensor]], starts: Sequence[int]) -> None:
        self._shards, self.starts = shards, starts
        self.lse = torch.stack([shard["lse"].double() for shard in shards])
        self.whole = torch.logsumexp(self.lse, dim=0)
        self.weight = torch.where(self.whole > -torch.inf, (self.lse - self.whole).exp(), 0.0)
        self.dead = self.whole == -torch.inf

    def of(self, name: str) -> Tensor:
        """[shard, batch, head, query] float64 of a statistic; zero where it is NaN."""
        return torch.stack([shard[name].double() for shard in self._shards]).nan_to_num(0.0)

    def each(self, name: str) -> list[Tensor]:
        """A statistic of each shard, as it is."""
        return [shard[name] for shard in self._shards]

    def mean(self, values: Tensor) -> Tensor:
        """Mean over shards by their mass."""
        return (self.weight * values).sum(0)

    def existing(self, name: str) -> Tensor:
        """The mean of a statistic over shards; NaN in rows that have it in none."""
        nowhere = torch.stack([shard[name] for shard in self._shards]).isnan().all(0)
        return self.mean(self.of(name)).masked_fill(nowhere, torch.nan)

    def alive(self, value: Tensor, dead: float = torch.nan) -> Tensor:
        """The value, `dead` in rows that see no key."""
        return value.masked_fill(self.dead, dead)
