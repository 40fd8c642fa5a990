"""Sparse layouts: which keys a query may see, known block by block, so that hidden blocks are never computed."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Layout(ABC):
    """The skeleton of a block-sparse mask.

    Attributes:
        block: edge of its square blocks, in tokens.
        n_layouts: number of different layouts among the heads; 1 if all heads share one. Query heads are split evenly
            among them, neighbours together, as grouped-query attention splits them among kv heads.
        exact: whether a block in which something is visible is visible as a whole, but for what the mask's own causal
            rule and window hide.
    """

    block: int
    n_layouts: int = 1
    exact: bool = False

    @abstractmethod
    def blocks(self) -> Tensor:
        """[layout, query block, key block] bool: whether some query of the block sees some key of the block."""

    @abstractmethod
    def visible(self, queries: slice, keys: slice, layouts: Tensor) -> Tensor:
        """[len(layouts), q, k] bool for a tile of rows and keys, exact to the token.

        Args:
            layouts: indices of the layouts that are asked for.
        """

    @property
    def is_described(self) -> bool:
        """Whether layouts that are equal are the same in all things: what is made of one serves the others."""
        parameters = getattr(self, "__dataclass_params__", None)
        try:
            hash(self)
        except TypeError:
            return False
        return parameters is not None and parameters.frozen and parameters.eq

    def for_heads(self, heads: slice | Tensor, n_heads: int) -> Tensor:
        """The layout index of each of these query heads."""
        index = torch.arange(n_heads)[heads] if isinstance(heads, slice) else heads
        return index // (n_heads // self.n_layouts)


def listed(used: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n] bool to the indices of the true entries in order, and their number [...], int32; what follows is none.

    The r-th is where r of them have been counted: found in their running number, without sorting.

    >>> listed(torch.tensor([False, True, False, True]))[0][:2].tolist()
    [1, 3]
    """
    counted = used.cumsum(-1, dtype=torch.int32)
    ranks = torch.arange(1, used.shape[-1] + 1, dtype=torch.int32, device=used.device).expand(used.shape)
    found = torch.searchsorted(counted, ranks.contiguous(), out_int32=True)
    return found, counted[..., -1].contiguous()
