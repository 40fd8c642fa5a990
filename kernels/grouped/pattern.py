"""A map that lies in groups: in each, some rows and some columns meet; all else is zero and is never held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_finite
from workbench.kernels.history import own
from workbench.kernels.layouts import Layout
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern


@dataclass(frozen=True, eq=False)
class _Groups(Layout):
    """The layout of groups that are the same for every input: rows and columns are [1 or head, group, place]."""

    rows: Tensor
    columns: Tensor
    sizes: tuple[int, int]
    block: int = 64

    @property
    def n_layouts(self) -> int:  # type: ignore[override]
        return max(len(self.rows), len(self.columns))

    def blocks(self) -> Tensor:
        """[layout, query block, key block] bool."""
        shape = [-(-n // self.block) for n in self.sizes]
        rows, columns = (
            torch.div(t, self.block, rounding_mode="floor").where(t >= 0, -1) for t in (self.rows, self.columns)
        )
        return self._met(rows, columns, (0, 0), (shape[0], shape[1]))

    def visible(self, queries: slice, keys: slice, layouts: Tensor) -> Tensor:
        """[len(layouts), q, k] bool."""
        rows, columns = (t if len(t) == 1 else t[layouts.to(t.device)] for t in (self.rows, self.columns))
        sizes = queries.stop - queries.start, keys.stop - keys.start
        return self._met(rows, columns, (queries.start, keys.start), sizes).expand(len(layouts), -1, -1)

    @staticmethod
    def _met(rows: Tensor, columns: Tensor, start: tuple[int, int], sizes: tuple[int, int]) -> Tensor:
        ones = torch.ones(1, 1, 1, 1, 1, dtype=torch.uint8, device=rows.device)
        return _scattered(ones, rows[None], columns[None], start, sizes)[0] > 0


def _scattered(
    weights: Tensor, rows: Tensor, columns: Tensor, start: tuple[int, int], sizes: tuple[int, int]
) -> Tensor:
    """[b, h, q, k]: weights [b, h, group, row, column] at their places in a tile; what falls outside is left out."""
    places = []
    for index, first, size in zip((rows, columns), start, sizes, strict=True):
        moved = index - first
        places.append(moved.where((index >= 0) & (moved >= 0) & (moved < size), -1))
    i, j = places
    touched = ((i >= 0).any(-1) & (j >= 0).any(-1)).flatten(0, 1).any(0)
    if not bool(touched.all()):
        i, j = i[:, :, touched], j[:, :, touched]
        weights = weights if weights.shape[2] == 1 else weights[:, :, touched]
    n_rows, n_columns = sizes
    at = i[..., :, None] * n_columns + j[..., None, :]
    at = at.where((i[..., :, None] >= 0) & (j[..., None, :] >= 0), n_rows * n_columns)  # one place for all the rest
    b, h = (max(weights.shape[axis], at.shape[axis]) for axis in (0, 1))
    whole = (b, h, *at.shape[2:])
    out = weights.new_zeros(b, h, n_rows * n_columns + 1)
    if weights.dtype == torch.uint8:
        out.scatter_(2, at.expand(whole).flatten(2), 1)
    else:
        out.scatter_add_(2, at.expand(whole).flatten(2), weights.expand(whole).flatten(2))
    return out[..., :-1].view(b, h, n_rows, n_columns)


class GroupedPattern(Pattern):
    """A[i, j]: the sum over groups of the weight where row i and column j meet in the group.

    What is held grows with the groups, not with the square of the length. A position may be in several groups, or none.

    Args:
        weights: [batch, head, group, row, column], zero where a row does not see a column of its group.
        rows: [1 or batch, 1 or head, group, row], the position of each row; −1 for none.
        columns: [1 or batch, 1 or head, group, column], likewise.
        n_queries, n_keys: size of the map.
        causal: no key after the query is seen.
        chosen: the groups depend on the input, so that any key could have been seen; else what lies outside of them is
            hidden, and the statistics count it so.
        normalised: whether rows sum to one.
        values: [batch, kv head, key, width], kept for `value_weighted`; optional.

    Raises:
        CaptureError: sizes that do not fit, positions outside of the map, weights that are not finite.

    >>> rows = torch.tensor([[[[0, 1], [2, -1]]]])
    >>> GroupedPattern(torch.full((1, 1, 2, 2, 2), 0.5), rows, rows, 3, 3).dense()[0, 0].tolist()
    [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.5]]
    """

    def __init__(
        self,
        weights: Tensor,
        rows: Tensor,
        columns: Tensor,
        n_queries: int,
        n_keys: int,
        *,
        causal: bool = False,
        chosen: bool = False,
        normalised: bool = True,
        values: Tensor | None = None,
    ) -> None:
        _check(weights, rows, columns, n_queries, n_keys)
        b, h = weights.shape[:2]
        dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
        mask = Mask(n_queries, n_keys, causal=causal, offset=n_keys - n_queries)
        if not chosen:
            if max(len(rows), len(columns)) > 1:
                raise CaptureError("groups that differ from one batch entry to the next are chosen=True")
            layout = _Groups(rows[0], columns[0], (n_queries, n_keys))
            mask = Mask(
                n_queries, n_keys, causal=causal, offset=n_keys - n_queries, layout=layout, n_heads=h,
            )  # fmt: skip
        super().__init__((b, h, n_queries, n_keys), mask, dtype, weights.device)
        self.weights, self.rows_of, self.columns_of = own(weights), rows, columns
        self.causal, self.chosen, self.normalised = causal, chosen, normalised
        self.signed = bool((self.weights < 0).any())
        self.values = None if values is None else values.detach()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The size and kind of the map; weights, rows and columns, and the values where they are kept."""
        facts = {"n_queries": self.n_queries, "n_keys": self.n_keys, "causal": self.causal, "chosen": self.chosen,
                 "normalised": self.normalised}  # fmt: skip
        held = {"weights": self.weights, "rows": self.rows_of, "columns": self.columns_of, "values": self.values}
        return facts, {name: t for name, t in held.items() if t is not None}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> GroupedPattern:
        """The pattern from its `state`."""
        return cls(tensors["weights"], tensors["rows"], tensors["columns"], **facts, values=tensors.get("values"))

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A."""
        which = range(self.n_heads) if heads is None else self._checked(heads)
        return self.tile_of(slice(None), queries, keys, which)

    def tile_of(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        """[b, h, q, k] for these batch entries."""
        rows, columns = (self._own(t, batch, heads) for t in (self.rows_of, self.columns_of))
        weights = self.weights[batch][:, list(heads)].to(self.dtype)
        sizes = queries.stop - queries.start, keys.stop - keys.start
        return _scattered(weights, rows, columns, (queries.start, keys.start), sizes)

    @staticmethod
    def _own(index: Tensor, batch: slice, heads: Sequence[int]) -> Tensor:
        index = index if len(index) == 1 else index[batch]
        return index if index.shape[1] == 1 else index[:, list(heads)]

    def apply(self, values: Tensor) -> Tensor:
        """A·V, [batch, head, query, width], group by group."""
        return apply_groups(
            self.weights.to(self.dtype), self._checked_values(values), self.rows_of, self.columns_of, self.n_queries
        )


def apply_groups(weights: Tensor, values: Tensor, rows: Tensor, columns: Tensor, n_queries: int) -> Tensor:
    """A·V, [batch, head, query, width], of weights [batch, head, group, row, column]; see `GroupedPattern`."""
    z = weights @ gathered(values, columns)
    b, h, width = *weights.shape[:2], values.shape[-1]
    at = rows.where(rows >= 0, n_queries).expand(b, h, -1, -1).flatten(2)[..., None].expand(-1, -1, -1, width)
    out = z.new_zeros(b, h, n_queries + 1, width)
    return out.scatter_add(2, at, z.flatten(2, 3))[:, :, :-1]


def gathered(tensor: Tensor, index: Tensor) -> Tensor:
    """[batch, head, group, place, width] of a tensor [batch, head, position, width]; zeros where the index is −1."""
    b, h, _, width = tensor.shape
    at = index.clamp(min=0).expand(b, h, -1, -1)
    found = tensor.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, width)).view(*at.shape, width)
    return found if bool((index >= 0).all()) else found.masked_fill((index < 0)[..., None], 0)


def _check(weights: Tensor, rows: Tensor, columns: Tensor, n_queries: int, n_keys: int) -> None:
    if weights.dim() != 5 or not weights.is_floating_point():
        raise CaptureError("weights must be [batch, head, group, row, column]", shape=weights.shape)
    check_finite("weights", weights)
    for name, index, axis, size in (("rows", rows, 3, n_queries), ("columns", columns, 4, n_keys)):
        wanted = (*weights.shape[:3], weights.shape[axis])
        fits = index.dim() == 4 and index.dtype == torch.long and index.shape[2:] == wanted[2:]
        if not fits or any(index.shape[i] not in (1, wanted[i]) for i in (0, 1)):
            raise CaptureError(f"{name} must be whole numbers, {list(wanted)} or 1 in the first two", shape=index.shape)
        if index.device != weights.device:
            raise CaptureError(f"{name} is on {index.device}, and the weights on {weights.device}")
        if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < size:
            raise CaptureError(f"{name} holds a position outside of the {size} of the map", shape=index.shape)
