"""How few blocks any order of tokens can visit: what a set of queries sees is never smaller than a known volume."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from workbench.errors import CaptureError
from workbench.kernels.neighborhood.axis import Axis

if TYPE_CHECKING:
    from workbench.kernels.neighborhood.layout import NeighborhoodLayout


def fewest_blocks(layout: NeighborhoodLayout, block: int = 128, key_block: int | None = None) -> int:
    """A count of pairs of query block and key block that no order of the tokens goes below.

    Args:
        block: queries in a block. key_block: keys in a block; as many if None.

    n tokens make at least ⌈n / block⌉ blocks of queries. By the inequality of Brunn and Minkowski, v queries see at
    least (v^(1/d) + c^(1/d))^d keys in d dimensions, where c is the product of window − stride: one reads as much for
    the windows' overhang as for their middles. A block of queries visits that over `key_block`, rounded up. Queries
    that a border gives the same window count for the part of it that is theirs alone; in a causal dimension those
    whose window the border cuts do not count. So the bound is close where windows are small beside the shape.

    It holds as well for keys that lie in several blocks at once, which nothing here makes use of.

    Raises:
        CaptureError: a block below 1.

    >>> from workbench.kernels.neighborhood import NeighborhoodLayout, flop_bound
    >>> layout = NeighborhoodLayout((56, 56), 7)
    >>> fewest_blocks(layout), round(layout.n_tokens**2 / flop_bound(layout) / 128**2, 1)  # if pairs could be packed
    (50, 9.4)
    """
    key_block = block if key_block is None else key_block
    if min(block, key_block) < 1:
        raise CaptureError(f"block={block} or key_block={key_block} is below 1")
    d = len(layout.axes)
    volume = math.prod(_volume(axis) for axis in layout.axes)
    overhang = math.prod(axis.window - axis.stride for axis in layout.axes) ** (1 / d)
    one = math.prod(1 if axis.causal else axis.window for axis in layout.axes)

    # The largest volume of queries for each number of visited blocks; a sum of such pairs is bounded by its hull.
    steps, n, v = [], max(1, -(-(one + layout.extra_keys) // key_block)), 0.0
    while v < block:
        keys = n * key_block - layout.extra_keys
        v = min(max(keys ** (1 / d) - overhang + 1e-9, 0) ** d, block)
        steps.append((n, v))
        n += 1
    n_blocks = -(-layout.n_tokens // block)
    mean = volume / n_blocks
    edges = [(n, v, (m - n) / (w - v)) for n, v in steps if v < mean for m, w in steps if w >= mean]
    at_mean, at_none = min(((n + slope * (mean - v), n - slope * v) for n, v, slope in edges), default=(steps[0][0], 1))
    if at_none < 0:  # more blocks with less in each visit fewer
        return math.ceil(min(n / v for n, v in steps if v > 0) * volume - 1e-6)
    return math.ceil(at_mean * n_blocks - 1e-6)


def _volume(axis: Axis) -> float:
    """The sum over queries of the length that each adds to the union of windows, at most 1 each."""
    total = 0
    for start, length, alike in axis.classes:
        if axis.causal:
            total += alike * max(length - (axis.window - axis.stride), 0)
            continue
        low = axis.bounds(torch.arange(length) * axis.dilation + start)[0]
        at, many = low.unique(return_counts=True)
        gaps = torch.cat((at.diff(), torch.tensor([axis.stride])))
        total += alike * int(torch.minimum(gaps, many).sum())
    return total
