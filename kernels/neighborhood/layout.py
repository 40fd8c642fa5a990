"""Neighborhoods in one to three dimensions as a layout over flat tokens, and orders of tokens in which they pack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import LARGEST, check_range
from workbench.kernels.layouts import Layout
from workbench.kernels.neighborhood.axis import Axis


@dataclass(frozen=True)
class NeighborhoodLayout(Layout):
    """Each token sees a window around it: the rule of `Axis` in every dimension at once.

    On FlexAttention it runs in blocks of 128 queries and 128 or 64 keys, and `fewest_blocks` says how few pairs of
    them any order of the tokens can visit: many more than windows hold where windows are small.

    Attributes:
        shape: lengths of the one to three dimensions; tokens are numbered row-major.
        window, stride, dilation, causal: of each dimension; one value stands for all.
        extra_keys: so many keys after the prod(shape) of the tokens are seen by every query.
        block: edge of the blocks, in tokens.
        tile: tokens come in the order of `token_permutation(shape, tile, dilation)`; None for row-major.

    Raises:
        CaptureError: a number out of range; the message names it.

    >>> NeighborhoodLayout((2, 3), (1, 2)).visible(slice(0, 6), slice(0, 6), torch.tensor([0]))[0, 2].int().tolist()
    [0, 1, 1, 0, 0, 0]
    """

    shape: tuple[int, ...]
    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    extra_keys: int = 0
    block: int = 64
    tile: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not 1 <= len(self.shape) <= 3:
            raise CaptureError(f"shape={list(self.shape)} has {len(self.shape)} dimensions, not one to three")
        for name in ("window", "stride", "dilation", "causal", "tile"):
            given = getattr(self, name)
            values = tuple(given) if isinstance(given, Sequence) else (given,) * len(self.shape)
            if len(values) != len(self.shape):
                raise CaptureError(f"{name}={list(values)} does not fit the {len(self.shape)} dimensions of shape")
            if given is not None:
                object.__setattr__(self, name, values)
        whole = [*self.shape, *(n for each in (self.window, self.stride, self.dilation) for n in each), self.extra_keys]  # type: ignore[union-attr]
        for value in (*whole, self.block, *(self.tile or ())):
            check_range("a size", value, -LARGEST, LARGEST)
        if not all(isinstance(value, bool) for value in self.causal):  # type: ignore[union-attr]
            raise CaptureError(f"causal is True or False in each dimension, not {self.causal}")
        check_range("the number of tokens", math.prod(self.shape) + self.extra_keys, -LARGEST, LARGEST)
        if self.extra_keys < 0:
            raise CaptureError(f"extra_keys={self.extra_keys} is negative")
        if self.block < 1 or (self.tile is not None and min(self.tile) < 1):
            raise CaptureError(f"block={self.block} and tile={self.tile} are at least 1")
        self.axes  # noqa: B018 checks the numbers

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The rule of each dimension."""
        options = (self.shape, self.window, self.stride, self.dilation, self.causal)
        return tuple(Axis(*each) for each in zip(*options, strict=True))  # type: ignore[arg-type]

    @property
    def n_tokens(self) -> int:
        """prod(shape), the number of queries."""
        return math.prod(self.shape)

    @property
    def n_keys(self) -> int:
        """The tokens and the extra keys."""
        return self.n_tokens + self.extra_keys

    @cached_property
    def order(self) -> Tensor | None:
        """[token]: the row-major number of the token at each place; None if they are the same."""
        return None if self.tile is None else token_permutation(self.shape, self.tile, self.dilation)[0]

    def facts(self) -> dict[str, Any]:
        """What JSON needs to make the layout again."""
        return asdict(self)

    def coordinates(self, tokens: Tensor) -> list[Tensor]:
        """The position in each dimension of tokens that are given by their row-major numbers."""
        found = []
        for length in reversed(self.shape):
            found.append(tokens % length)
            tokens = tokens // length
        return found[::-1]

    def sees(self, queries: Tensor, keys: Tensor, order: Tensor | None) -> Tensor:
        """Bool, broadcast: whether the query at one place sees the key at another; `order` is that of the layout."""
        real = keys.clamp(max=self.n_tokens - 1)
        if order is not None:
            queries, real = order[queries], order[real]
        found = keys >= self.n_tokens if self.extra_keys else None
        inside: Tensor | None = None
        for axis, x, y in zip(self.axes, self.coordinates(queries), self.coordinates(real), strict=True):
            here = axis.sees(x, y)
            inside = here if inside is None else inside & here
        assert inside is not None
        return inside if found is None else inside | found

    def visible(self, queries: slice, keys: slice, layouts: Tensor) -> Tensor:
        """[len(layouts), q, k] bool."""
        i, j = torch.arange(queries.start, queries.stop), torch.arange(keys.start, keys.stop)
        return self.sees(i[:, None], j, self.order).expand(len(layouts), -1, -1)

    def blocks(self) -> Tensor:
        """[1, query block, key block] bool, from the dimensions one by one: nothing of [query, key] is built."""
        b, n = self.block, self.n_tokens
        order = torch.arange(n) if self.order is None else self.order
        found = torch.zeros(1, -(-n // b), -(-self.n_keys // b), dtype=torch.bool)
        found[:, :, n // b :] = self.extra_keys > 0
        for row in range(found.shape[1]):
            seen = self._seen_by_some(order[row * b : (row + 1) * b])[order]
            seen = torch.nn.functional.pad(seen, (0, -n % b)).view(-1, b).any(1)
            found[0, row, : len(seen)] |= seen
        return found

    def _seen_by_some(self, tokens: Tensor) -> Tensor:
        """[token] bool, row-major: the tokens that at least one of these sees."""
        places = self.coordinates(tokens)
        *leading, last = (
            axis.sees(x[:, None], torch.arange(axis.length)).float() for axis, x in zip(self.axes, places, strict=True)
        )
        if not leading:
            return last.any(0)
        rows = leading[0]
        for more in leading[1:]:
            rows = (rows[:, :, None] * more[:, None]).flatten(1)
        return (rows.mT @ last > 0).flatten()  # the number of queries whose window holds the token


@lru_cache(maxsize=16)
def token_permutation(
    shape: tuple[int, ...], tile: tuple[int, ...], dilation: int | tuple[int, ...] = 1
) -> tuple[Tensor, Tensor]:
    """An order of the tokens in which each tile, of one dilation class, lies in one piece; and its inverse.

    >>> order, inverse = token_permutation((2, 4), (2, 2))
    >>> order.tolist(), order[inverse].tolist()
    ([0, 1, 4, 5, 2, 3, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7])
    """
    dilations = (dilation,) * len(shape) if isinstance(dilation, int) else dilation
    axes = [Axis(n, 1, 1, d) for n, d in zip(shape, dilations, strict=True)]
    found = flat_tiles([axis.tiles(size) for axis, size in zip(axes, tile, strict=True)], shape).flatten()
    order = found[found >= 0]
    return order, order.argsort()


def flat_tiles(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Row-major token numbers [tile, token] of the products of tiles [tile, position]; -1 where a part is."""
    tokens, real = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    for part, length in zip(parts, shape, strict=True):
        size = len(tokens) * len(part), -1
        tokens = (tokens[:, None, :, None] * length + part[None, :, None, :]).reshape(size)
        real = (real[:, None, :, None] & (part >= 0)[None, :, None, :]).reshape(size)
    return tokens.where(real, -1)
