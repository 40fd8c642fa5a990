"""Boxes of tokens that fill FlexAttention's blocks: where queries and keys are cut, and which boxes share a block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.kernels.flex import BLOCK, HALF
from workbench.kernels.neighborhood.axis import Axis
from workbench.kernels.neighborhood.fewest import fewest_blocks
from workbench.kernels.neighborhood.layout import NeighborhoodLayout, flat_tiles
from workbench.kernels.neighborhood.packing import packed

_PARTIAL = 0.2  # what computing a mask adds to a block's products
_MOST_TILES = 2048  # in one dimension
_TRIED = 6, 4, 12  # of the best, that are laid out, by each of the scores
_SAVES = 1.05  # so much less work key blocks of 64 must be: their tiles are smaller, and their lists longer
_PACKED = 3  # of the best, with other boxes of queries each, whose keys are packed without boxes too
_MOST_PACKED = 1 << 22  # pairs of a box of queries and a key, up to which they are
_LAID_OUT = 1 << 22  # pairs of boxes, from which on no more are
_OPEN = 64  # blocks with room that a box may go to
_NONE = 1 << 40


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Tokens in blocks, as many places of queries as of keys (the last may be empty): layouts share a compiled kernel.

    Attributes:
        queries, keys: [block, 128] row-major numbers of tokens, −1 for padding; of keys, [block, 128 or 64].
        seen, whole: [query block, key block] bool: whether some query sees some key; whether each sees all 128 or 64.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor
    whole: Tensor


@dataclass(frozen=True)
class Cut:
    """One dimension cut twice: `size` positions to a tile of queries, the first `offset` short; the same of keys."""

    size: int
    offset: int
    key_size: int
    key_offset: int


def arrange(layout: NeighborhoodLayout) -> Arrangement:
    """The arrangement of a row-major layout with the least work in blocks and masks, of those that are tried.

    Queries and keys are cut on grids of their own, so that what a box of queries sees ends where boxes of keys end.
    Boxes at borders that leave room in their block share it with others that see, or are seen by, much the same.
    Where what is visited is far above what any order must visit, keys come in blocks of 64 too; and since borders move
    windows off any grid, they are then also packed one by one, by what sees them.
    """
    work, found = _best(layout, BLOCK)
    if work <= _SAVES * fewest_blocks(layout):
        return found
    of_halves, finer = _best(layout, HALF)
    return finer if _SAVES * of_halves < work else found


def _best(layout: NeighborhoodLayout, key_block: int) -> tuple[float, Arrangement]:
    """The least work in blocks of so many keys, in pairs of 128 queries and 128 keys; and its arrangement."""
    least = fewest_blocks(layout, BLOCK, key_block)
    extra = -(-layout.extra_keys // key_block)

    def work(of: Arrangement) -> float:
        visited = int(of.seen.sum()) + extra * len(of.queries)
        return visited * (1 + _PARTIAL) - int(of.whole.sum()) * _PARTIAL

    made: dict[tuple[tuple[int, int], ...], tuple[float, Arrangement, tuple[Cut, ...]]] = {}
    for cuts in _choices(layout, key_block):
        found = _lay_out(layout, cuts, key_block)
        of_queries = tuple((cut.size, cut.offset) for cut in cuts)
        if of_queries not in made or work(found) < made[of_queries][0]:
            made[of_queries] = work(found), found, cuts
        if int(found.whole.sum()) == int(found.seen.sum()) == least:
            break
    ranked = sorted(made.values(), key=lambda one: one[0])
    best, chosen, _ = ranked[0]
    if key_block == HALF and best > _SAVES * least:
        for _, _, cuts in ranked[:_PACKED]:
            finer = _pack(layout, cuts, key_block)
            if finer is not None and work(finer) < best:
                best, chosen = work(finer), finer
    return best * key_block / BLOCK, chosen


def _choices(layout: NeighborhoodLayout, key_block: int) -> Iterator[tuple[Cut, ...]]:
    """Boxes of at most 128 queries and so many keys, those with the fewest pairs that meet first."""
    most = torch.tensor([BLOCK, key_block])
    volumes, counts, ways = torch.ones(1, 2, dtype=torch.long), torch.ones(1, 3, dtype=torch.long), [()]
    for axis in layout.axes:
        cuts, numbers = _cuts(axis)
        sizes = torch.tensor([(cut.size, cut.key_size) for cut in cuts])
        volume = (volumes[:, None] * sizes).flatten(0, 1)
        pairs = (counts[:, None, 0] * numbers[:, 0]).flatten()
        kept = (volume <= most).all(1).nonzero()[:, 0]
        kept = kept[pairs[kept].argsort(stable=True)]
        kept = kept[_firsts(volume[kept, 0] * (BLOCK + 1) + volume[kept, 1])]
        before, here = kept // len(cuts), kept % len(cuts)
        volumes, counts = volume[kept], counts[before] * numbers[here]
        ways = [(*ways[i], cuts[j]) for i, j in zip(before.tolist(), here.tolist(), strict=True)]
    full = -(-layout.n_tokens // most)
    pairs = counts[:, 0].double()
    filled = full.prod() / counts[:, 1:].clamp(min=full).prod(1)  # how full blocks are if no two boxes share one
    sharing = (most // volumes).prod(1).double()  # boxes that fit into a block, of queries times of keys
    scores = pairs, pairs * filled.sqrt(), pairs / sharing**0.75
    best = [score.argsort(stable=True)[:n].tolist() for score, n in zip(scores, _TRIED, strict=True)]
    laid_out = 0
    for at in dict.fromkeys(at for ranked in zip_longest(*best) for at in ranked if at is not None):
        yield ways[at]
        laid_out += int(counts[at, 1] * counts[at, 2])
        if laid_out > _LAID_OUT:
            return


def _firsts(numbers: Tensor) -> Tensor:
    """Where each of the numbers comes first."""
    values, inverse = numbers.unique(return_inverse=True)
    places = torch.arange(len(numbers))
    return torch.full_like(values, len(numbers)).scatter_reduce(0, inverse, places, "amin").sort()[0]


@lru_cache(maxsize=16)
def _cuts(axis: Axis) -> tuple[list[Cut], Tensor]:
    """For each two sizes the best offsets; and [cut, 3]: pairs of tiles that meet, tiles of queries, tiles of keys."""
    sizes = _sizes(axis)
    of_keys, shift = torch.tensor(sizes)[:, None], torch.arange(max(sizes))
    longest = axis.classes[0][1]
    cuts, numbers = [], []
    for size in sizes:
        found: dict[int, tuple[tuple[int, int, int], Cut]] = {}
        for offset in {0, (-longest % size) // 2}:
            pairs, n_keys = torch.zeros(2, len(sizes), len(shift), dtype=torch.long)
            n_queries = 0
            for start, length, alike in axis.classes:
                tiles = torch.arange(-offset, length, size)
                first, last = tiles.clamp(min=0), (tiles + size).clamp(max=length) - 1
                low, high = (axis.bounds(x * axis.dilation + start)[i] for i, x in enumerate((first, last)))
                visited = (high[:, None, None] + shift) // of_keys - (low[:, None, None] + shift) // of_keys + 1
                pairs = pairs + alike * visited.sum(0)
                n_keys = n_keys + alike * ((length - 1 + shift) // of_keys + 1)
                n_queries += alike * len(tiles)
            order = (pairs * (2 * axis.length + 1) + n_keys).masked_fill(shift >= of_keys, _NONE)
            places = order.argmin(1, keepdim=True)
            for at, (key_size, place) in enumerate(zip(sizes, places[:, 0].tolist(), strict=True)):
                number = int(pairs[at, place]), n_queries, int(n_keys[at, place])
                if key_size not in found or number < found[key_size][0]:
                    found[key_size] = number, Cut(size, offset, key_size, place)
        for number, cut in found.values():
            cuts.append(cut)
            numbers.append(number)
    return cuts, torch.tensor(numbers)


def _sizes(axis: Axis) -> list[int]:
    """Positions of a tile that are tried: small ones, parts of the whole, and some strides."""
    longest = axis.classes[0][1]
    largest = min(longest, BLOCK)
    parts = {-(-longest // n) for n in range(1, 33)}
    wanted = parts | {*range(1, 17), 32, 64} | {axis.stride * n for n in (1, 2, 3, 4, 6, 8)} | {largest}
    return sorted(s for s in wanted if s <= largest and (longest <= _MOST_TILES * s or s == largest))


def _lay_out(layout: NeighborhoodLayout, cuts: tuple[Cut, ...], key_block: int) -> Arrangement:
    boxes = _boxes(layout, cuts, [(cut.key_size, cut.key_offset) for cut in cuts])
    return _arranged(boxes, _shared(boxes.seen.mT, (boxes.keys >= 0).sum(1), key_block), key_block)


def _pack(layout: NeighborhoodLayout, cuts: tuple[Cut, ...], key_block: int) -> Arrangement | None:
    """The same boxes of queries, with keys packed one by one; None where there are too many."""
    n_boxes = math.prod(len(axis.tiles(cut.size, cut.offset)) for axis, cut in zip(layout.axes, cuts, strict=True))
    if n_boxes * layout.n_tokens > _MOST_PACKED:
        return None
    boxes = _boxes(layout, cuts, [(1, 0)] * len(cuts))
    group = packed(boxes.seen.mT, key_block)
    return None if group is None else _arranged(boxes, group, key_block)


def _boxes(layout: NeighborhoodLayout, cuts: tuple[Cut, ...], key_tiles: Sequence[tuple[int, int]]) -> Arrangement:
    """Blocks of queries, and keys in boxes: of each dimension the size and offset of their tiles."""
    axes = layout.axes
    rows = [axis.tiles(cut.size, cut.offset) for axis, cut in zip(axes, cuts, strict=True)]
    columns = [axis.tiles(*tile) for axis, tile in zip(axes, key_tiles, strict=True)]
    meets = [axis.meets(x, y) for axis, x, y in zip(axes, rows, columns, strict=True)]
    seen, whole = (reduce(_product, [each[i] for each in meets]) for i in (0, 1))
    queries, keys = flat_tiles(rows, layout.shape), flat_tiles(columns, layout.shape)
    group = _shared(seen, (queries >= 0).sum(1), BLOCK)
    return Arrangement(_fill(queries, group, BLOCK), keys, _any(seen, group), _all(whole, group))


def _arranged(boxes: Arrangement, group: Tensor, key_block: int) -> Arrangement:
    """With the boxes of keys of each group in a block, and as many places of queries as of keys."""
    seen, whole = _any(boxes.seen.mT, group).mT, _all(boxes.whole.mT, group).mT
    queries, keys = boxes.queries, _fill(boxes.keys, group, key_block)
    each = BLOCK // key_block
    n_blocks = max(len(queries), -(-len(keys) // each))
    more_queries, more_keys = n_blocks - len(queries), n_blocks * each - len(keys)
    seen, whole = (F.pad(x, (0, more_keys, 0, more_queries)) for x in (seen, whole & (keys >= 0).all(1)))
    queries, keys = (F.pad(x, (0, 0, 0, n), value=-1) for x, n in ((queries, more_queries), (keys, more_keys)))
    return Arrangement(queries, keys, seen, whole)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[q1 · q2, k1 · k2] of [q1, k1] and [q2, k2] bool."""
    return (a[:, None, :, None] & b[None, :, None, :]).flatten(2).flatten(0, 1)


def _shared(seen: Tensor, sizes: Tensor, block: int) -> Tensor:
    """[box] the block of each: first with boxes that meet much of what it meets, then with any that leave room."""
    group = _joined(seen, sizes, block, least=1)
    sizes = torch.zeros(int(group.max()) + 1, dtype=torch.long).index_add(0, group, sizes)
    return _joined(_any(seen, group), sizes, block, least=0)[group]


def _joined(seen: Tensor, sizes: Tensor, block: int, least: int) -> Tensor:
    """[box] its own block, or that of an earlier box with the most in common, `least` or more, and room for both."""
    volumes = sizes.tolist()
    room = block - min(volumes)
    blocks = list(range(len(volumes)))
    opened: list[int] = []  # the first box of each block with room
    taken: list[int] = []
    rows = [int.from_bytes(row.tobytes()) for row in np.packbits(seen.cpu().numpy(), axis=1)]  # a bit for each
    for box, volume in enumerate(volumes):
        if volume > room:
            continue
        mine = rows[box]
        fits = [
            (rows[other] & mine).bit_count() if n + volume <= block else -1
            for other, n in zip(opened, taken, strict=True)
        ]
        at = max(range(len(fits)), key=fits.__getitem__, default=None)
        if at is None or fits[at] < least:
            opened.append(box)
            taken.append(volume)
            if len(opened) > _OPEN:
                del opened[0], taken[0]
            continue
        first = blocks[box] = opened[at]
        rows[first] |= mine
        taken[at] += volume
        if taken[at] > room:
            del opened[at], taken[at]
    return torch.tensor(blocks).unique(return_inverse=True)[1]


def _any(boxes: Tensor, group: Tensor) -> Tensor:
    """[block, ...] whether it holds for a box of the block."""
    n = int(group.max()) + 1
    return boxes if n == len(boxes) else boxes.new_zeros(n, boxes.shape[1]).index_put((group,), boxes, accumulate=True)


def _all(boxes: Tensor, group: Tensor) -> Tensor:
    """[block, ...] whether it holds for all boxes of the block."""
    return ~_any(~boxes, group)


def _fill(boxes: Tensor, group: Tensor, block: int) -> Tensor:
    """[block, place] tokens of boxes [box, token], those of a block after each other, −1 for padding."""
    order = group.argsort(stable=True)
    tokens, where = boxes[order].flatten(), group[order].repeat_interleave(boxes.shape[1])
    tokens, where = tokens[tokens >= 0], where[tokens >= 0]
    n = where.bincount()
    found = torch.full((len(n), block), -1)
    found[where, torch.arange(len(where)) - (n.cumsum(0) - n)[where]] = tokens
    return found
