"""What a mask lets through, counted for each query and each key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskSummary:
    """What a mask lets through; leading dimensions are [batch or 1, head or 1].

    Attributes:
        keys_per_query: [b, h, query], number of keys a query sees; 0 marks a fully masked row.
        queries_per_key: [b, h, key], number of queries that see a key.
        first_key: [b, h, query], the first key a query sees (0 where it sees none).
    """

    keys_per_query: Tensor
    queries_per_key: Tensor
    first_key: Tensor

    @cached_property
    def sees(self) -> Tensor:
        """[b, h, query] bool: whether a query sees a key."""
        return self.keys_per_query > 0

    @cached_property
    def derived(self) -> dict[Any, Any]:
        """What engines have made of the same mask, to be made once."""
        return {}


# All layers of a model have the same few rules, and to count takes as long as the statistics of a short call.
@lru_cache(maxsize=16)
def summary_of_rules(
    n_queries: int, n_keys: int, causal: bool, offset: int, window: int, device: torch.device
) -> MaskSummary:
    """The counts of a causal or windowed rule on positions, with the queries at `offset`: [1, 1, query or key]."""
    with torch.inference_mode(False):  # it is kept
        i = torch.arange(n_queries, device=device) + offset
        j = torch.arange(n_keys, device=device)
        first = (i - window + 1).clamp(min=0)
        last = (i if causal else i + window - 1).clamp(max=n_keys - 1)
        oldest = j if causal else j - window + 1  # absolute positions of the queries that see key j
        newest = j + window - 1
        low = oldest.clamp(min=offset)
        high = newest.clamp(max=offset + n_queries - 1)
        keys, queries = (last - first + 1).clamp(min=0), (high - low + 1).clamp(min=0)
        first = torch.where(keys > 0, first, 0)
    return MaskSummary(keys[None, None], queries[None, None], first[None, None])
