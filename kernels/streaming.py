"""All statistics of a pattern in one pass over its tiles, with O(queries + keys) memory and never the whole map."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.kernels import accumulators
from workbench.kernels.accumulators import LOG_FLOOR, Tile
from workbench.kernels.statistics import VALUE_WEIGHTED, Options, check_names, output_names

if TYPE_CHECKING:
    from workbench.kernels.patterns import Pattern

# One tile of all its heads should stay in the second-level cache: larger ones cost 2x to 15x in page faults.
_TILE_NUMBERS = 12 * 192 * 192
_TILE_QUERIES, _TILE_KEYS = 192, 192


def statistics(pattern: Pattern, names: Sequence[str], options: Options | None = None) -> dict[str, Tensor]:
    """Stream the named statistics of a pattern; `top_keys` gives `top_keys_index` and `top_keys_weight`.

    Returns:
        name -> tensor, shaped as `statistics.STATISTICS` says, in float32 (float64 for float64 patterns).

    Raises:
        CaptureError: unknown name, or what a statistic needs (token ids, values) is missing.
    """
    options = options or Options()
    names = check_names(names)
    plain = [name for name in names if not name.startswith(VALUE_WEIGHTED)]
    weighted = [name.removeprefix(VALUE_WEIGHTED) for name in names if name.startswith(VALUE_WEIGHTED)]
    found = _stream(pattern, plain, options)
    if weighted:
        by_value = _stream(pattern.value_weighted(), weighted, options)
        found |= {VALUE_WEIGHTED + name: value for name, value in by_value.items()}
    return {out: found[out] for name in names for out in output_names(name)}


def _stream(pattern: Pattern, names: list[str], options: Options) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    names = list(names)
    if "lse" in names:
        names.remove("lse")
        found["lse"] = pattern.lse
    if "signed_mass" in names:
        names.remove("signed_mass")
        found["signed_mass"] = pattern.signed_mass
    if pattern.by_magnitude:
        pattern = pattern.magnitude()
    if not names:
        return found
    space = pattern.space()
    collectors = accumulators.build(names, space, options)
    wants_log = any(c.wants_log for c in collectors)
    edge = options.block if any(name.startswith("pooled") for name in names) else 1
    for tile in tiles(pattern, wants_log, edge):
        for collector in collectors:
            collector.add(tile)
    for collector in collectors:
        found |= collector.results()
    return found


def tiles(pattern: Pattern, wants_log: bool = False, edge: int = 1) -> Iterator[Tile]:
    """Every tile of the pattern that may hold weight, once. Its tensors are reused: copy what should stay.

    Args:
        wants_log: also fill `log_p`.
        edge: tiles start at multiples of this many queries and keys.
    """
    n_rows = _round_up(min(_TILE_QUERIES, pattern.n_queries), edge)
    n_keys = _round_up(min(_TILE_KEYS, pattern.n_keys), edge)
    for batch, heads in chunks(pattern.n_batch, pattern.n_heads, pattern.head_group, n_rows * n_keys):
        make = pattern.maker(batch, heads, wants_log)
        for queries in _rows(pattern.n_queries, n_rows):
            for keys in pattern.mask.key_tiles(queries, n_keys, heads):
                p, log_p = make(queries, keys)
                yield Tile(p, log_p, batch, heads, queries, keys, pattern.mask.offset)


def rectangles(pattern: Pattern) -> Iterator[tuple[slice, slice]]:
    """Every (queries, keys) rectangle that may hold weight, for all heads and batch entries together."""
    edge = max(1, int((_TILE_NUMBERS / (pattern.n_batch * pattern.n_heads)) ** 0.5))
    everything = slice(0, pattern.n_heads)
    for queries in _rows(pattern.n_queries, edge):
        for keys in pattern.mask.key_tiles(queries, edge, everything):
            yield queries, keys


def _rows(n_queries: int, step: int) -> Iterator[slice]:
    for start in range(0, n_queries, step):
        yield slice(start, min(start + step, n_queries))


def chunks(n_batch: int, n_heads: int, group: int, tile_numbers: int) -> Iterator[tuple[slice, slice]]:
    """Groups of batch entries and heads whose tiles together fit the cache; a `group` of heads is never cut."""
    at_once = max(1, _TILE_NUMBERS // tile_numbers)
    step_heads = min(n_heads, max(1, at_once // group) * group)
    step_batch = max(1, at_once // n_heads)
    for b in range(0, n_batch, step_batch):
        for h in range(0, n_heads, step_heads):
            yield slice(b, min(b + step_batch, n_batch)), slice(h, min(h + step_heads, n_heads))


def _round_up(n: int, edge: int) -> int:
    return max(edge, math.ceil(n / edge) * edge)


def log_sum_exp(pattern: Pattern) -> Tensor:
    """[batch, head, query] log of the softmax denominator, online over tiles; -inf in rows that see no key."""
    space = pattern.space()
    top = space.per_query(-torch.inf, torch.float64)
    total = space.per_query(0.0, torch.float64)
    n_rows, n_keys = min(_TILE_QUERIES, pattern.n_queries), min(_TILE_KEYS, pattern.n_keys)
    for batch, heads in chunks(pattern.n_batch, pattern.n_heads, pattern.head_group, n_rows * n_keys):
        make = pattern.score_maker(batch, heads)
        for queries in _rows(pattern.n_queries, n_rows):
            at = (batch, heads, queries)
            for keys in pattern.mask.key_tiles(queries, n_keys, heads):
                scores = make(queries, keys)
                peak = torch.maximum(top[at], scores.amax(-1).double())
                total[at] *= (top[at] - peak).exp()
                less = scores.sub_(peak[..., None].to(scores.dtype)).clamp_(min=LOG_FLOOR[scores.dtype])
                total[at] += less.exp_().sum(-1)
                top[at] = peak
    return space.alive(top + total.log(), -torch.inf)
