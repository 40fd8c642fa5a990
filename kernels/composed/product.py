"""The product of several maps: what reaches a query through a few positions in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.composed.nested import put_together, taken_apart
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern


class ComposedPattern(Pattern):
    """A = P₁·P₂·…: each query reads what lies in between, and that reads the keys.

    `apply` and each tile cost what lies in between, and nothing of [query, key] is held but the tile. A factor is there
    by its name in `factors`; `through(positions)` is the part of A that goes by some of the positions in between.

    Args:
        factors: the maps by name, in the order in which they are written: the first has the queries, the last the keys.
        values: [batch, kv head, key, width], kept for `value_weighted`; optional.

    Its dtype is the widest of theirs.

    Raises:
        CaptureError: fewer than two factors, some whose sizes do not fit, or on several devices.

    >>> from workbench.kernels.patterns import DensePattern
    >>> halves = DensePattern(torch.full((1, 1, 3, 2), 0.5))
    >>> keys = DensePattern(torch.eye(2).expand(1, 1, 2, 2))
    >>> ComposedPattern({"broadcast": halves, "aggregate": keys}).dense()[0, 0, 0].tolist()
    [0.5, 0.5]
    """

    def __init__(self, factors: Mapping[str, Pattern], *, values: Tensor | None = None) -> None:
        made = list(factors.values())
        if len(made) < 2:
            raise CaptureError(f"a product has at least two factors, not {len(made)}")
        for (name, left), right in pairwise(zip(factors, made, strict=True)):
            if (left.n_batch, left.n_heads, left.n_keys) != (*right[1].shape[:2], right[1].n_queries):
                raise CaptureError(
                    f'the factor "{name}" is {list(left.shape)}, and the next one {list(right[1].shape)}',
                    hint="batch and heads are the same, and the keys of one are the queries of the next",
                )
        first, last = made[0], made[-1]
        devices = {str(each.device) for each in made}
        if len(devices) > 1:
            raise CaptureError(f"the factors are on {' and '.join(sorted(devices))}", hint="move them to one device")
        shape, dtype = (*first.shape[:3], last.n_keys), reduce(torch.promote_types, (each.dtype for each in made))
        super().__init__(shape, Mask(first.n_queries, last.n_keys), dtype, first.device)
        self._factors = dict(factors)
        self.signed = any(each.signed for each in made)
        # A row that sees nothing takes its share from all that go by it.
        self.normalised = all(each.normalised and bool((each.seen.keys_per_query > 0).all()) for each in made)
        self.grade = next((each.grade for each in made if each.grade != "exact"), "exact")
        self.values = None if values is None else values.detach()

    @property
    def factors(self) -> Mapping[str, Pattern]:
        """The maps by name, in the order in which they are written."""
        return self._factors

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Name, family and facts of each factor; their tensors under its name, and the values where they are kept."""
        facts, tensors = taken_apart(self._factors)
        return {"factors": facts}, tensors if self.values is None else tensors | {"values": self.values}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> ComposedPattern:
        """The pattern from its `state`."""
        return cls(put_together(facts["factors"], tensors), values=tensors.get("values"))

    def check(self) -> None:
        """As the factors do."""
        for each in self._factors.values():
            each.check()

    @cached_property
    def _inner(self) -> tuple[Tensor, Tensor]:
        """The first factor, and the product of all others: both are as long as the sequence, and no more."""
        first, *others = (each.dense(limit=None).to(self.dtype) for each in self._factors.values())
        right = others[-1]
        for each in reversed(others[:-1]):
            right = each @ right
        return first, right

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A."""
        which = range(self.n_heads) if heads is None else self._checked(heads)
        return self.tile_of(slice(None), queries, keys, which)

    def tile_of(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        """[b, h, q, k] for these batch entries."""
        left, right = self._inner
        return left[batch, :, queries][:, list(heads)] @ right[batch, ..., keys][:, list(heads)]

    def through(self, positions: Sequence[int], heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, query, key] of the part of A that goes by these positions in between; all of them make A.

        Raises:
            CaptureError: there are more than two factors, or no such position.
        """
        if len(self._factors) != 2:
            raise CaptureError(f"a product of {len(self._factors)} maps has several places in between")
        left, right = self._inner
        if bad := [m for m in positions if not -left.shape[-1] <= m < left.shape[-1]]:
            raise CaptureError(f"{left.shape[-1]} positions lie in between, and no position {bad[0]}")
        which = list(range(self.n_heads) if heads is None else self._checked(heads))
        return left[:, which][..., list(positions)] @ right[:, which][:, :, list(positions)]

    def apply(self, values: Tensor) -> Tensor:
        """A·V, [batch, head, query, width], from the right, each product in the dtype of its factor."""
        z = self._checked_values(values)
        for each in reversed(self._factors.values()):
            z = each.apply(z)
        return z.to(self.dtype)
