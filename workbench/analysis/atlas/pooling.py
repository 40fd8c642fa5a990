"""Patterns of any length on one small square, and what tells their kind, in one walk over tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.analysis.profile.places import Places
from workbench.analysis.profile.sums import Walk, batches, spread
from workbench.kernels.patterns import Pattern


@dataclass
class PooledPatterns:
    """What the atlas takes of one pattern, or of many beside each other. Prefix tokens of images take no part.

    Attributes:
        maps: [example, head, size, size] the pattern, pooled. float32.
        scores: [example, head, name] of `SCORES`, float64; NaN where a name does not apply.
    """

    maps: Tensor
    scores: Tensor


SCORES = ("self", "previous", "next", "row", "column", "block", "vertical stripe", "uniform")
"""Names that one pattern alone can show, along the last axis of `PooledPatterns.scores`."""


def pool(pattern: Pattern, places: Places, size: int) -> PooledPatterns:
    """Pool every head's pattern to [size, size] and measure how much it is of each kind.

    A query or key takes an equal share of the square's side; one that crosses cells is split by length. Cell (I, J) is
    the mean weight that the queries in I give to the keys in J, all of it, so that a row of the square sums to what the
    pattern's rows sum to. Padding is left out, and so are the prefix tokens of images.

    The scores compare with uniform attention over the keys that each query may see:

    * self, previous, next, row, column, block: (m − u) / (1 − u), not below 0, with m the share of the weight on such
      pairs and u the share under uniform attention. Previous and next are the neighbours in the sequence, in images to
      the left and right in the grid; row and column are the query's own; a block is all up to r hops away, r an eighth
      of the longer side and at least 1.
    * vertical stripe: ½ Σ_j |r_j − v_j|, with r_j the share of the weight that key j receives from all queries and v_j
      what it would receive under uniform attention.
    * uniform: the entropy of each row over ln of the number of keys it may see, a mean over rows.
    """
    pattern.check()
    pattern = pattern.magnitude() if pattern.by_magnitude else pattern
    parts = [_pool(pattern, batch, places, size) for batch in batches(pattern)]
    return PooledPatterns(torch.cat([p.maps for p in parts]), torch.cat([p.scores for p in parts]))


def _pool(pattern: Pattern, batch: slice, places: Places, size: int) -> PooledPatterns:
    walk = Walk(pattern, batch, places)
    b, h = walk.shape
    cells = places.map_shape[0] * places.map_shape[1]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    maps, found, even = zeros(b, h, size, size), zeros(b, h, cells), zeros(b, h, cells)
    received, expected = zeros(b, h, pattern.n_keys), zeros(b, h, pattern.n_keys)
    share, rows = zeros(b, h), zeros(b, h)
    inside = walk.real.clone()
    inside[:, : places.prefix] = False
    overlap = overlaps(inside, size)
    mean = overlap / overlap.sum(-1, keepdim=True).clamp(min=1e-300)
    for queries in walk.blocks():
        n, left, plogp = (zeros(b, h, queries.stop - queries.start) for _ in range(3))
        for keys in walk.keys(queries, patches=True):
            p, seen = walk.tile(queries, keys)
            n += seen.sum(-1)
            left += p.sum(-1)
            plogp += torch.xlogy(p, p).sum(-1)
            maps += mean[:, None, :, queries] @ p @ overlap[:, None, :, keys].transpose(-1, -2)
        whole = left.clamp(min=1e-300)
        entropy = torch.where(left > 0, whole.log() - plogp / whole, 0.0)
        share += torch.where(n > 1, entropy / n.clamp(min=2).log(), 0.0).sum(-1)
        rows += (n > 1).sum(-1)
        for keys in walk.keys(queries, patches=True):
            p, seen = walk.tile(queries, keys)
            index = places.offsets(queries, keys)
            # A query that sees one key has no choice, and tells nothing.
            choice = (n > 1)[..., None]
            p, flat = p * choice, seen * choice / n.clamp(min=1)[..., None]
            spread(found, p, index)
            spread(even, flat, index)
            received[..., keys] += p.sum(-2)
            expected[..., keys] += flat.sum(-2)
    found, even = (x / x.sum(-1, keepdim=True).clamp(min=1e-300) for x in (found, even))
    received, expected = (x / x.sum(-1, keepdim=True).clamp(min=1e-300) for x in (received, expected))
    some = found.sum(-1) > 0
    scores = {
        name: _excess(found[..., where].sum(-1), even[..., where].sum(-1)) for name, where in kinds(places).items()
    }
    scores["vertical stripe"] = (received - expected).abs().sum(-1) / 2
    scores["uniform"] = share / rows.clamp(min=1)
    nothing = torch.full((b, h), torch.nan, dtype=torch.float64)
    columns = [torch.where(some, scores.get(name, nothing), torch.nan) for name in SCORES]
    return PooledPatterns(maps.float(), torch.stack(columns, -1))


def kinds(places: Places) -> dict[str, Tensor]:
    """[cell] bool over the flattened map of offsets: which pairs a name means."""
    dy, dx = places.steps()
    near = max(1, max(places.rows, places.columns) // 8)
    found = {"self": (dy == 0) & (dx == 0), "previous": (dy == 0) & (dx == -1), "next": (dy == 0) & (dx == 1)}
    if not places.text:
        found |= {"row": dy == 0, "column": dx == 0}
    return found | {"block": places.hops() <= near}


def _excess(share: Tensor, even: Tensor) -> Tensor:
    """What a share has over the uniform one, of what it could have; 0 where uniform attention has it all."""
    return torch.where(even < 1, (share - even) / (1 - even).clamp(min=1e-300), 0.0).clamp(min=0)


def overlaps(inside: Tensor, size: int) -> Tensor:
    """[batch, cell, token] the share of each token that lies in each cell; tokens that are not inside lie in none.

    >>> overlaps(torch.tensor([[True, True, True]]), 6)[0, :, 1].tolist()
    [0.0, 0.0, 0.5, 0.5, 0.0, 0.0]
    """
    rank = inside.cumsum(-1).double() - 1
    wide = size / inside.sum(-1, keepdim=True).clamp(min=1).double()
    start = (rank * wide)[:, None]
    cell = torch.arange(size, dtype=torch.float64)[None, :, None]
    shared = torch.minimum(start + wide[:, None], cell + 1) - torch.maximum(start, cell)
    return (shared.clamp(min=0) / wide[:, None]) * inside[:, None]
