"""All statistics of a pattern, pass by pass over its tiles, with O(queries + keys) memory and never the whole map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.kernels import accumulators
from workbench.kernels.accumulators import Accumulator
from workbench.kernels.finishing import finish
from workbench.kernels.plan import Pass, passes
from workbench.kernels.statistics import VALUE_WEIGHTED, Options, check_names, output_names
from workbench.kernels.tile import BITS, LOG_FLOOR, Online, Rows, Tile

if TYPE_CHECKING:
    from workbench.kernels.patterns import Maker, Pattern

# Smaller tiles lose time, since threads wait for each other after each operation; larger ones leave the caches.
_TILE_NUMBERS = 12 * 192 * 192
_TILE_QUERIES, _TILE_KEYS = 256, 256
_TILES_AT_ONCE = 16  # per strip; what accumulators keep of each until then stays small
_NOTHING_YET = -1e20  # above the scores of hidden keys, below all others


def statistics(pattern: Pattern, names: Sequence[str], options: Options | None = None) -> dict[str, Tensor]:
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


def engines(pattern: Pattern, names: Sequence[str], options: Options) -> set[str]:
    """What streams these statistics: "torch", "native" (C++), "triton"."""
    plan = passes(names)
    found = {pattern.engine(each.statistics, options) for each in plan.passes}
    if plan.weighted:
        by_value = pattern.value_weighted()
        found |= {by_value.engine(each.statistics, options) for each in plan.weighted}
    return found


def _stream(pattern: Pattern, names: list[str], options: Options) -> dict[str, Tensor]:
    """The passes of the plan, one after the other."""
    raw: dict[str, Tensor] = {}
    for each in passes(names, denominators_known=pattern.denominators_known).passes:
        fused = pattern.fused_pass(each, options)
        raw |= _pass(pattern, each, options) if fused is None else fused
    if "lse" in names:
        raw["lse"] = pattern.lse
    if "signed_mass" in names:
        raw["signed_mass"] = pattern.signed_mass
    return finish(raw, names, pattern.space(), options)


def _pass(pattern: Pattern, each: Pass, options: Options) -> dict[str, Tensor]:
    """One pass in plain torch."""
    names = [name for name in each.statistics if name not in ("lse", "signed_mass")]
    edge = options.block if any(name.startswith("pooled") for name in names) else 1
    collectors = accumulators.build(names, pattern.space(), options, _round_up(_TILE_KEYS, edge))
    if each.finds_denominators:
        find_denominators(pattern, collectors)
    else:
        for rows, strip in _strips(pattern, any(c.wants_log for c in collectors), edge):
            for count, tile in enumerate(strip, 1):
                for collector in collectors:
                    collector.add(tile)
                if count % _TILES_AT_ONCE == 0:
                    _close(collectors, rows)
            _close(collectors, rows)
    raw: dict[str, Tensor] = {}
    for collector in collectors:
        raw |= collector.results()
    return raw


def _close(collectors: Sequence[Accumulator], rows: Rows) -> None:
    for collector in collectors:
        collector.close(rows)


def find_denominators(pattern: Pattern, collectors: Sequence[Accumulator] = ()) -> None:
    """One pass that collects row statistics on a running scale, finds the denominators, and divides by them."""
    space = pattern.space()
    lead = space.per_query(_NOTHING_YET) if pattern.sinks is None else space.per_query() + pattern.sinks[None, :, None]
    mass, signed = space.per_query(dtype=torch.float64), space.per_query(dtype=torch.float64)
    spare = torch.empty(0, dtype=pattern.dtype, device=pattern.device)
    for rows, keys, raw in _raw_tiles(pattern):
        if pattern.has_scores:
            log_p = _raise_lead(rows, raw, lead, mass, collectors).mul_(BITS).clamp_(min=LOG_FLOOR[pattern.dtype])
            if spare.numel() < raw.numel():
                spare = torch.empty_like(raw).flatten()
            p = torch.exp2(log_p, out=spare[: raw.numel()].view(raw.shape))
        else:
            signed[rows] += raw.sum(-1)
            p = raw.abs_()
            log_p = p.log2().clamp_(min=_NOTHING_YET)
        mass[rows] += p.sum(-1)
        tile = Tile(p, log_p, *rows, keys, pattern.mask.offset, p.clone)
        for collector in collectors:
            collector.add(tile)
        _close(collectors, rows)
    denominator = mass.clone()
    if pattern.sinks is not None:
        denominator += (pattern.sinks[None, :, None] - lead).double().exp()
    for collector in collectors:
        collector.normalise(denominator.to(pattern.dtype), mass.to(pattern.dtype))
    pattern.found_denominators(lead + denominator.log() if pattern.has_scores else denominator, signed)


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


def tiles(pattern: Pattern) -> Iterator[Tile]:
    """Every tile of the pattern that may hold weight, once. Its tensors are reused: copy what should stay."""
    for _, strip in _strips(pattern):
        yield from strip


def _strips(pattern: Pattern, wants_log: bool = False, edge: int = 1) -> Iterator[tuple[Rows, Iterator[Tile]]]:
    """Some rows at a time, and the tiles of all that they may see.

    Args:
        wants_log: also fill `log_p`.
        edge: tiles start at multiples of this many queries and keys.
    """
    n_rows = _round_up(min(_TILE_QUERIES, pattern.n_queries), edge)
    n_keys = _round_up(min(_TILE_KEYS, pattern.n_keys), edge)
    for batch, heads in chunks(pattern, n_rows * n_keys):
        make = pattern.maker(batch, heads, wants_log)
        for queries in _rows(pattern.n_queries, n_rows):
            rows = (batch, heads, queries)
            yield rows, _strip(make, rows, pattern.mask.key_tiles(queries, n_keys, heads), pattern.mask.offset)


def _strip(make: Maker, rows: Rows, keys_seen: Iterable[slice], offset: int) -> Iterator[Tile]:
    def weights(keys: slice) -> Tensor:
        return make(rows[2], keys)[0]

    for keys in keys_seen:
        yield Tile(*make(rows[2], keys), *rows, keys, offset, partial(weights, keys))


def _raw_tiles(pattern: Pattern) -> Iterator[tuple[Rows, slice, Tensor]]:
    """Every tile that may hold weight, of scores or of weights that are not normalised: (rows, keys, tile)."""
    n_rows, n_keys = min(_TILE_QUERIES, pattern.n_queries), min(_TILE_KEYS, pattern.n_keys)
    for batch, heads in chunks(pattern, n_rows * n_keys):
        make = pattern.raw_maker(batch, heads)
        for queries in _rows(pattern.n_queries, n_rows):
            for keys in pattern.mask.key_tiles(queries, n_keys, heads):
                yield (batch, heads, queries), keys, make(queries, keys)


def _rows(n_queries: int, step: int) -> Iterator[slice]:
    for start in range(0, n_queries, step):
        yield slice(start, min(start + step, n_queries))


def chunks(pattern: Pattern, tile_numbers: int) -> Iterator[tuple[slice, slice]]:
    """Batch entries and heads whose tiles together fit the cache; a group of heads that share keys is never cut."""
    n_batch, n_heads, group = pattern.n_batch, pattern.n_heads, pattern.head_group
    at_once = max(1, pattern.tile_scale * _TILE_NUMBERS // tile_numbers)
    step_heads = min(n_heads, max(1, at_once // group) * group)
    step_batch = max(1, at_once // n_heads)
    for b in range(0, n_batch, step_batch):
        for h in range(0, n_heads, step_heads):
            yield slice(b, min(b + step_batch, n_batch)), slice(h, min(h + step_heads, n_heads))


def _round_up(n: int, edge: int) -> int:
    return max(edge, math.ceil(n / edge) * edge)
