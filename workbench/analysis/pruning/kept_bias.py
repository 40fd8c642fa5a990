"""T5's attention when it has lost heads: its first layer's position bias serves all layers, which may keep others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention

from workbench.errors import InterventionError
from workbench.hooks.sites import Site


class PrunedT5Attention(T5Attention):
    """Takes and gives the bias of all heads that there were, and adds that of the heads that it kept.

    Attributes:
        kept: numbers of the heads that are left, in the unpruned model. all_heads: how many it had.
    """

    kept: list[int]
    all_heads: int
    _whole: Tensor | None = None

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """[1, kept head, query, key]."""
        self._whole = super().compute_bias(*args, **kwargs)
        return self._whole[:, self.kept]

    def __call__(self, *args: Any, position_bias: Tensor | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """As T5Attention's, with the position bias of all heads [batch or 1, head, query, key]."""
        own = None if position_bias is None else position_bias[:, self.kept]
        output, used, *rest = super().__call__(*args, position_bias=own, **kwargs)
        whole, self._whole = position_bias if self._whole is None else self._whole, None
        if whole is None:  # there is no bias, which T5 writes as zeros
            whole = used.new_zeros(()).expand(used.shape[0], self.all_heads, *used.shape[2:])
        return (output, whole, *rest)


def keep_bias(site: Site, module: nn.Module, keep: Sequence[int], n_heads: int) -> None:
    """Make a pruned attention module, whose bias is that of `n_heads` heads, add that of the kept ones.

    Raises:
        InterventionError: it is not T5's.
    """
    pruned: Any = module
    if type(module) is T5Attention:
        pruned.__class__ = PrunedT5Attention
        pruned.kept, pruned.all_heads = list(keep), n_heads
    elif type(module) is PrunedT5Attention:
        pruned.kept = [pruned.kept[head] for head in keep]
    else:
        raise InterventionError(
            f"{type(module).__name__} cannot be pruned: its position bias is not known", site=site.name
        )
