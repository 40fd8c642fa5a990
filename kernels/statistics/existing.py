"""Which rows can have a statistic: those that see a key of the kind that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.masks import Mask

_CELLS = 1 << 24  # of a block of rows that is looked at, at a time


@dataclass(frozen=True)
class Rows:
    """The rows of a map: what they may see, (batch, head, query, key), and where their numbers live.

    Attributes:
        known: what was found of the same mask before.
    """

    mask: Mask
    shape: tuple[int, int, int, int]
    device: torch.device
    known: dict[Any, Any] = field(default_factory=dict)

    @property
    def i(self) -> Tensor:
        """[query] absolute positions."""
        return torch.arange(self.shape[2], device=self.device) + self.mask.offset

    @property
    def j(self) -> Tensor:
        """[key] positions."""
        return torch.arange(self.shape[3], device=self.device)

    @property
    def by_rules(self) -> bool:
        """Whether positions alone say what a row sees: a direction and a window."""
        return self.mask.tensor is None and self.mask.layout is None

    def reach(self, j: Tensor) -> Tensor:
        """Whether the rules let each row see the key at `j` [..., query], which is no later than the row itself."""
        there = (j >= 0) & (j < self.shape[3])
        return there if self.mask.window is None else there & (self.i - j < self.mask.window)

    def once(self, name: str, find: Callable[[], Tensor]) -> Tensor:
        """What hangs on the mask alone, found for the first of the maps that share it."""
        at = name, self.shape
        if at not in self.known:
            with torch.inference_mode(False):  # it is kept
                self.known[at] = find()
        found: Tensor = self.known[at]
        return found

    def that_see(self, wanted: Callable[[slice], Tensor]) -> Tensor:
        """[batch, head or 1, query] bool: rows that see some wanted key, by looking at all of them.

        Args:
            wanted: [batch or 1, query, key] bool for a block of rows.
        """
        n_batch, n_heads, n_queries, n_keys = self.shape
        step = max(1, _CELLS // max(1, n_batch * n_heads * n_keys))
        found = []
        for start in range(0, n_queries, step):
            queries = slice(start, min(start + step, n_queries))
            asked = wanted(queries)[:, None]
            seen = self.mask.visible(queries, slice(0, n_keys), slice(0, n_batch), slice(0, n_heads))
            found.append((asked if seen is None else asked & seen.to(self.device)).any(-1))
        return torch.cat(found, -1)
