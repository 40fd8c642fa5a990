"""All statistics of a pattern, pass by pass over its tiles, with O(queries + keys) memory and never the whole map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.kernels.plan import Pass, passes
from workbench.kernels.source import Streamed, TileMaker, TileSource
from workbench.kernels.statistics import VALUE_WEIGHTED, Accumulator, Options, check_names, finish, known, output_names
from workbench.kernels.tile import BITS, LOG_FLOOR, Online, Rows, Space, Tile

# Smaller tiles lose time, since threads wait for each other after each operation; larger ones leave the caches.
_TILE_NUMBERS = 12 * 192 * 192
_TILE_QUERIES, _TILE_KEYS = 256, 256
_TILES_AT_ONCE = 16  # per strip; what accumulators keep of each until then stays small
_NOTHING_YET = -1e20  # above the scores of hidden keys, below all others


def statistics(pattern: Streamed, names: Sequence[str], options: Options | None = None) -> dict[str, Tensor]:
    """Stream the named statistics of a pattern; `top_keys` gives `top_keys_index` and `top_keys_weight`.

    Returns:
        name -> tensor, shaped as `statistics.STATISTICS` says, in float32 (float64 for float64 patterns).

    Raises:
        CaptureError: unknown name, NaN or inf in the pattern's tensors, or what a statistic needs (token ids, values)
            is missing.
    """
    options = options or Options()
    names = check_names(names)
    plain = [name for name in names if not name.startswith(VALUE_WEIGHTED)]
    weighted = [name.removeprefix(VALUE_WEIGHTED) for name in names if name.startswith(VALUE_WEIGHTED)]
    if names:
        pattern.check()
    found = _stream(pattern.magnitude() if pattern.by_magnitude else pattern, plain, options) if plain else {}
    if weighted:
        by_value = _stream(pattern.value_weighted(), weighted, options)
        found |= {VALUE_WEIGHTED + name: value for name, value in by_value.items()}
    return {out: found[out] for name in names for out in output_names(name)}


def engines(pattern: Streamed, names: Sequence[str], options: Options) -> set[str]:
    """What streams these statistics: "torch", "native" (C++), "triton", or an engine that a user has registered."""
    plan = passes(names)
    found = {engine for each in plan.passes for engine in pattern.engines(each.statistics, options)}
    if plan.weighted:
        by_value = pattern.value_weighted()
        found |= {engine for each in plan.weighted for engine in by_value.engines(each.statistics, options)}
    return found


def costs(pattern: Streamed, names: Sequence[str], options: Options) -> list[str]:
    """What plain torch costs where it streams some of these on a device: why it does, and in how many tiles."""
    if pattern.device.type == "cpu":
        return []
    plan = passes(names)
    several = [(pattern.magnitude() if pattern.by_magnitude else pattern, each) for each in plan.passes]
    if plan.weighted:
        by_value = pattern.value_weighted()
        several += [(by_value, each) for each in plan.weighted]
    found = []
    for source, each in several:
        why = source.unfused(each.statistics, options)
        if why is not None:
            what = ", ".join(each.statistics) or "row sums"
            found.append(f"{what}: {why}; plain torch takes 30 to 250 launches for each of {_about(source):,} tiles")
    return found


def _about(source: TileSource) -> int:
    """How many tiles a pass has at most."""
    rows, columns = (-(-n // most) for n, most in zip(source.shape[2:], (_TILE_QUERIES, _TILE_KEYS), strict=True))
    several = sum(1 for _ in chunks(source, _TILE_QUERIES * _TILE_KEYS))
    below = min(rows, columns) if source.mask.causal else 1
    return several * (rows * columns - below * (below - 1) // 2)


def _stream(pattern: Streamed, names: list[str], options: Options) -> dict[str, Tensor]:
    """The passes of the plan, one after the other."""
    raw: dict[str, Tensor] = {}
    for each in passes(names, denominators_known=pattern.denominators_known).passes:
        raw |= pattern.collect(each, options)
    for name in names:
        read = known(name).of_pattern
        if read is not None:
            raw[name] = read(pattern)
    return finish(raw, names, pattern.space(), options)


class Denominators(NamedTuple):
    """What a pass over raw tiles finds of each row, [batch, head, query] in float64.

    Attributes:
        total: the log-sum-exp of scores, or Σ |A|. signed: Σ A; zero for scores.
    """

    total: Tensor
    signed: Tensor


def collect(source: TileSource, each: Pass, options: Options) -> tuple[dict[str, Tensor], Denominators | None]:
    """One pass in plain torch: the raw sums, and the denominators where the pass finds them."""
    edge = options.block if any(known(name).axes == "block" for name in each.statistics) else 1
    collectors = _collectors(each.statistics, source.space(), options)
    found = None
    if each.finds_denominators:
        found = find_denominators(source, collectors)
    else:
        for rows, strip in _strips(source, any(c.wants_log for c in collectors), edge):
            for count, tile in enumerate(strip, 1):
                for collector in collectors:
                    collector.add(tile)
                if count % _TILES_AT_ONCE == 0:
                    _close(collectors, rows)
            _close(collectors, rows)
            for collector in collectors:
                collector.end_rows(rows)
    raw: dict[str, Tensor] = {}
    for collector in collectors:
        raw |= collector.results()
    return raw, found


def _collectors(names: Sequence[str], space: Space, options: Options) -> list[Accumulator]:
    """What collects these statistics, once for those that share it; those that need log p first."""
    records = [known(name) for name in names if known(name).of_pattern is None]
    shared = {each.collect or each.name: each for each in records}
    made = [each.collector(space, options) for each in shared.values()]
    return sorted(made, key=lambda collector: not collector.wants_log)


def _close(collectors: Sequence[Accumulator], rows: Rows) -> None:
    for collector in collectors:
        collector.close(rows)


def find_denominators(source: TileSource, collectors: Sequence[Accumulator] = ()) -> Denominators:
    """One pass that collects row statistics on a running scale, finds the denominators, and divides by them."""
    space, sinks = source.space(), source.sinks
    lead = space.per_query(_NOTHING_YET) if sinks is None else space.per_query() + sinks[None, :, None]
    mass, signed = space.per_query(dtype=torch.float64), space.per_query(dtype=torch.float64)
    spare = torch.empty(0, dtype=source.dtype, device=source.device)
    for rows, keys, raw in _raw_tiles(source):
        if source.has_scores:
            log_p = _raise_lead(rows, raw, lead, mass, collectors).mul_(BITS).clamp_(min=LOG_FLOOR[source.dtype])
            if spare.numel() < raw.numel():
                spare = torch.empty_like(raw).flatten()
            p = torch.exp2(log_p, out=spare[: raw.numel()].view(raw.shape))
        else:
            signed[rows] += raw.sum(-1)
            p = raw.abs_()
            log_p = p.log2().clamp_(min=_NOTHING_YET)
        mass[rows] += p.sum(-1)
        tile = Tile(p, log_p, *rows, keys, source.mask.offset, p.clone)
        for collector in collectors:
            collector.add(tile)
        _close(collectors, rows)
    denominator = mass.clone()
    if sinks is not None:
        denominator += (sinks[None, :, None] - lead).double().exp()
    for collector in collectors:
        collector.normalise(denominator.to(source.dtype), mass.to(source.dtype))
    return Denominators(lead + denominator.log() if source.has_scores else denominator, signed)


def _raise_lead(rows: Rows, scores: Tensor, lead: Tensor, mass: Tensor, collectors: Sequence[Accumulator]) -> Tensor:
    """Take the largest score so far from the scores, in place; what was collected is put on the new scale."""
    top = torch.maximum(lead[rows], scores.amax(-1))
    shift = (lead[rows] - top).clamp(min=-200.0)
    online = Online(shift.exp(), shift, mass[rows].to(shift.dtype))
    for collector in collectors:
        collector.rescale(rows, online)
    mass[rows] *= online.factor
    lead[rows] = top
    return scores.sub_(top[..., None])


def tiles(source: TileSource) -> Iterator[Tile]:
    """Every tile of the pattern that may hold weight, once. Its tensors are reused: copy what should stay."""
    for _, strip in _strips(source):
        yield from strip


def _strips(source: TileSource, wants_log: bool = False, edge: int = 1) -> Iterator[tuple[Rows, Iterator[Tile]]]:
    """Some rows at a time, and the tiles of all that they may see.

    Args:
        wants_log: also fill `log_p`.
        edge: tiles start at multiples of this many queries and keys.
    """
    n_queries, n_keys = source.shape[2:]
    n_rows = _round_up(min(_TILE_QUERIES, n_queries), edge)
    n_columns = _round_up(min(_TILE_KEYS, n_keys), edge)
    for batch, heads in chunks(source, n_rows * n_columns):
        make = source.maker(batch, heads, wants_log)
        for queries in _rows(n_queries, n_rows):
            rows = (batch, heads, queries)
            yield rows, _strip(make, rows, source.mask.key_tiles(queries, n_columns, heads), source.mask.offset)


def _strip(make: TileMaker, rows: Rows, keys_seen: Iterable[slice], offset: int) -> Iterator[Tile]:
    def weights(keys: slice) -> Tensor:
        return make(rows[2], keys)[0]

    for keys in keys_seen:
        yield Tile(*make(rows[2], keys), *rows, keys, offset, partial(weights, keys))


def _raw_tiles(source: TileSource) -> Iterator[tuple[Rows, slice, Tensor]]:
    """Every tile that may hold weight, of scores or of weights that are not normalised: (rows, keys, tile)."""
    n_queries, n_keys = source.shape[2:]
    n_rows, n_columns = min(_TILE_QUERIES, n_queries), min(_TILE_KEYS, n_keys)
    for batch, heads in chunks(source, n_rows * n_columns):
        make = source.raw_maker(batch, heads)
        for queries in _rows(n_queries, n_rows):
            for keys in source.mask.key_tiles(queries, n_columns, heads):
                yield (batch, heads, queries), keys, make(queries, keys)


def _rows(n_queries: int, step: int) -> Iterator[slice]:
    for start in range(0, n_queries, step):
        yield slice(start, min(start + step, n_queries))


def chunks(source: TileSource, tile_numbers: int) -> Iterator[tuple[slice, slice]]:
    """Batch entries and heads whose tiles together fit the cache; a group of heads that share keys is never cut."""
    (n_batch, n_heads), group = source.shape[:2], source.head_group
    at_once = max(1, source.tile_scale * _TILE_NUMBERS // tile_numbers)
    step_heads = min(n_heads, max(1, at_once // group) * group)
    step_batch = max(1, at_once // n_heads)
    for b in range(0, n_batch, step_batch):
        for h in range(0, n_heads, step_heads):
            yield slice(b, min(b + step_batch, n_batch)), slice(h, min(h + step_heads, n_heads))


def _round_up(n: int, edge: int) -> int:
    return max(edge, math.ceil(n / edge) * edge)
