"""Paged caches, as continuous batching has them: the keys that a backend reads are known only inside of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from workbench.hooks.tap import Unshown


class PagedKeys:
    """What a paged cache gives in one call of a backend.

    The backend is called with a shallow copy of the cache, whose pages are the same: its `update` also tells here. The
    user's own cache is left as it is.

    Attributes:
        cache: the copy.
        keys, values: [1, kv head, key, d], those of all sequences one after another.
        ends: cumulative numbers of keys.
    """

    def __init__(self, cache: Any) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.ends: Tensor | None = None
        self._by_table = False
        self.cache = copy.copy(cache)
        update = cache.update

        def told(*args: Any, kwargs: dict[str, Any], **named: Any) -> tuple[Tensor, Tensor]:
            self.keys, self.values = update(*args, kwargs=kwargs, **named)
            self.ends = kwargs["cu_seq_lens_k"]
            self._by_table = kwargs.get("block_table") is not None
            return self.keys, self.values

        self.cache.update = told

    @classmethod
    def within(cls, kwargs: Mapping[str, Any]) -> PagedKeys | None:
        """Of a backend's keyword arguments; None if there is no paged cache."""
        cache = kwargs.get("cache")
        paged = hasattr(cache, "update") and kwargs.get("cu_seq_lens_q") is not None and "read_index" in kwargs
        return cls(cache) if paged else None

    def read(self, site: str) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and ends.

        Raises:
            Unshown: they did not come by, since the kernel reads the pages itself.
        """
        if self.keys is None or self.values is None or self.ends is None or self._by_table:
            raise Unshown(
                "its keys lie in a paged cache that the kernel reads by itself",
                site=site,
                hint="ContinuousBatchingConfig(max_blocks_per_request=0) lets the cache read them",
            )
        return self.keys, self.values, self.ends
