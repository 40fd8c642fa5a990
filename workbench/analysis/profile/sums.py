"""What a profile needs of one pattern, summed tile by tile: weight by offset, entropy, sink, spread over heads.

Tiles are of `_QUERIES` x `_KEYS` cells; beside them only sums per row and per offset are held, so that memory grows
with the number of tokens and not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.analysis.profile.places import Places
from workbench.kernels.patterns import Pattern
from workbench.kernels.source import TileMaker

_QUERIES, _KEYS = 128, 256
_NUMBERS = 1 << 21  # of a tile over all its heads and batch rows


@dataclass
class Sums:
    """Sums over the counted queries: patches, or the tokens that are no padding. All float64.

    Attributes:
        whole: [batch, head, offset] weight as the model has it, between patches or tokens.
        counted: the same without what the sink takes.
        pairs: [batch, head, offset] how many pairs of query and key `counted` could hold.
        rows: [batch, head] number of queries that see a key. sink: their weight on the sink.
        first: their weight on the first token, of images.
        entropy, share: their entropy in nats, and over ln of the number of keys seen. shares: how many rows have that.
        total: entropy of the whole rows. squares: Σ A².
        diversity: [batch] mean over the visible cells of the standard deviation across heads.
        cls_to_patches: [batch, head] weight of the first token's row on the patches; NaN without a prefix.
    """

    whole: Tensor
    counted: Tensor
    pairs: Tensor
    rows: Tensor
    sink: Tensor
    first: Tensor
    entropy: Tensor
    share: Tensor
    shares: Tensor
    total: Tensor
    squares: Tensor
    diversity: Tensor
    cls_to_patches: Tensor


def collect(pattern: Pattern, places: Places, sink: str) -> Sums:
    """The sums of one pattern, [query, key] of equal length.

    Args:
        places: of its tokens; text may be shorter than its row.
        sink: "separate", "keep" or "drop", as `attention_profile` takes it.
    """
    pattern.check()
    pattern = pattern.magnitude() if pattern.by_magnitude else pattern
    parts = [_collect(pattern, batch, places, sink) for batch in batches(pattern)]
    return Sums(**{name: torch.cat([getattr(part, name) for part in parts]) for name in Sums.__dataclass_fields__})


def batches(pattern: Pattern) -> Iterator[slice]:
    """Batch rows whose tiles are held at once."""
    step = max(1, _NUMBERS // (pattern.n_heads * min(_QUERIES, pattern.n_queries) * min(_KEYS, pattern.n_keys)))
    for start in range(0, pattern.n_batch, step):
        yield slice(start, min(start + step, pattern.n_batch))


def _collect(pattern: Pattern, batch: slice, places: Places, sink: str) -> Sums:
    walk = Walk(pattern, batch, places)
    b, h = batch.stop - batch.start, pattern.n_heads
    cells = places.map_shape[0] * places.map_shape[1]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    sizes = {"whole": (b, h, cells), "counted": (b, h, cells), "pairs": (b, h, cells), "diversity": (b,)}
    found = Sums(**{name: zeros(*sizes.get(name, (b, h))) for name in Sums.__dataclass_fields__})
    found.cls_to_patches += torch.nan
    visible_cells = torch.zeros(b, dtype=torch.float64)
    for queries in walk.blocks():
        rows = _Rows(b, h, queries.stop - queries.start)
        for keys in walk.keys(queries):
            p, seen = walk.tile(queries, keys)
            at_sink = walk.at_sink(keys)
            rows.add(p, seen, at_sink)
            for_all = seen.all(1)
            found.diversity += torch.where(for_all, p.std(1, correction=0), 0.0).sum((-1, -2))
            visible_cells += for_all.sum((-1, -2))
        scale = 1 / rows.left.clamp(min=torch.finfo(torch.float64).tiny) if sink == "drop" else None
        for keys in walk.keys(queries, patches=True):
            p, seen = walk.tile(queries, keys)
            index = places.offsets(queries, keys)
            spread(found.whole, p, index)
            if sink != "keep":
                away = ~walk.at_sink(keys)
                p, seen = p * away, seen & away
            p = p if scale is None else p * scale[..., None]
            spread(found.counted, p, index)
            spread(found.pairs, seen.double(), index)
        rows.close(found, sink)
    found.diversity /= visible_cells.clamp(min=1)
    if places.prefix:
        found.first = walk.first_weight()
        found.cls_to_patches = walk.cls_to_patches()
    return found


def spread(sums: Tensor, values: Tensor, index: Tensor) -> None:
    """Add [batch, head, query, key] to the cells [batch, head, offset] that `index` [query, key] names."""
    flat = sums.view(-1, sums.shape[-1])
    flat.index_add_(1, index.flatten(), values.reshape(flat.shape[0], -1))


class _Rows:
    """Sums over the keys, for a block of queries [batch, head, query]."""

    def __init__(self, *shape: int) -> None:
        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.left, self.plogp_left, self.seen_left = zeros(), zeros(), zeros()
        self.sink, self.plogp, self.squares, self.seen = zeros(), zeros(), zeros(), zeros()

    def add(self, p: Tensor, seen: Tensor, at_sink: Tensor) -> None:
        plogp = torch.xlogy(p, p)
        self.left += (p * ~at_sink).sum(-1)
        self.plogp_left += (plogp * ~at_sink).sum(-1)
        self.seen_left += (seen & ~at_sink).sum(-1)
        self.sink += (p * at_sink).sum(-1)
        self.plogp += plogp.sum(-1)
        self.squares += (p * p).sum(-1)
        self.seen += seen.sum(-1)

    def close(self, found: Sums, sink: str) -> None:
        """Add the rows to the sums over queries."""
        if sink == "drop":  # the entropy of what is left, as a distribution of its own
            kept = self.left > 0
            whole = self.left.clamp(min=torch.finfo(torch.float64).tiny)
            entropy, n = torch.where(kept, whole.log() - self.plogp_left / whole, 0.0), self.seen_left * kept
        else:
            entropy, n = -self.plogp, self.seen
        found.rows += (self.seen > 0).sum(-1)
        found.entropy += entropy.sum(-1)
        found.share += torch.where(n > 1, entropy / n.clamp(min=2).log(), 0.0).sum(-1)
        found.shares += (n > 1).sum(-1)
        found.sink += torch.where(self.seen > 0, self.sink, 0.0).sum(-1)
        found.total -= self.plogp.sum(-1)
        found.squares += self.squares.sum(-1)


class Walk:
    """Tiles of some batch rows of a pattern, in float64, with what may be seen."""

    def __init__(self, pattern: Pattern, batch: slice, places: Places) -> None:
        self.pattern, self.batch, self.places = pattern, batch, places
        self.heads = slice(0, pattern.n_heads)
        self.make: TileMaker = pattern.maker(batch, self.heads, False)
        self.shape = (batch.stop - batch.start, pattern.n_heads)
        asked = pattern.seen.queries_per_key.cpu()
        asked = asked if asked.shape[0] == 1 else asked[batch]
        self.real = (asked > 0).any(1).expand(self.shape[0], -1)  # [batch, key]; padding is a key that nobody sees
        self.first = self.real.int().argmax(-1)

    def blocks(self) -> Iterator[slice]:
        """Query rows that count."""
        for start in range(self.places.prefix, self.pattern.n_queries, _QUERIES):
            yield slice(start, min(start + _QUERIES, self.pattern.n_queries))

    def keys(self, queries: slice, *, patches: bool = False) -> Iterator[slice]:
        """Slices of the keys that these queries may see; `patches`: without the prefix."""
        for keys in self.pattern.mask.key_tiles(queries, _KEYS, self.heads):
            start = max(keys.start, self.places.prefix) if patches else keys.start
            if start < keys.stop:
                yield slice(start, keys.stop)

    def tile(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """Weights and visibility [batch, head, query, key]; rows of padding have neither."""
        p = self.make(queries, keys)[0].double().cpu()
        seen = self.pattern.mask.visible(queries, keys, self.batch, self.heads)
        seen = torch.ones((), dtype=torch.bool) if seen is None else seen.cpu()
        seen = (seen & self.real[:, None, queries, None]).expand(p.shape)
        return p * seen, seen

    def at_sink(self, keys: slice) -> Tensor:
        """[batch, 1, 1, key] bool: the prefix tokens of images, the first visible key of text."""
        at = torch.arange(keys.start, keys.stop)
        found = at[None] == self.first[:, None] if self.places.text else (at < self.places.prefix)[None]
        return found[:, None, None]

    def first_weight(self) -> Tensor:
        """[batch, head] weight of all patches on the first token."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        for queries in self.blocks():
            total += self.tile(queries, slice(0, 1))[0].sum((-1, -2))
        return total

    def cls_to_patches(self) -> Tensor:
        """[batch, head] weight of the first token's row on the patches."""
        return self.tile(slice(0, 1), slice(self.places.prefix, self.pattern.n_keys))[0].sum((-1, -2))
