"""From raw sums to statistics: what rows that see no key show, and what is divided by a count in the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.kernels.statistics import STATISTICS, Options, output_names
from workbench.kernels.tile import LOG_FLOOR, Space


def finish(raw: dict[str, Tensor], names: Sequence[str], space: Space, options: Options) -> dict[str, Tensor]:
    """The named statistics, in the pattern's dtype, from the sums that an engine collected.

    Row statistics of a query that sees no key are NaN, its `peak_key` is -1 and its `lse` -inf.
    """
    found = {}
    for name in names:
        if name == "lse":
            found[name] = space.alive(raw[name], -torch.inf)
        elif name == "peak_key":
            found[name] = torch.where(space.seen.keys_per_query > 0, raw[name], -1)
        elif name in ("entropy", "distance_var"):  # at least zero, but for rounding
            found[name] = space.alive(raw[name].clamp(min=0))
        elif name == "received_mean":
            queries = space.seen.queries_per_key
            found[name] = torch.where(queries > 0, raw["received"] / queries, torch.nan).to(space.dtype)
        elif name == "top_keys":
            alive = (space.seen.keys_per_query > 0)[..., None]
            weight = torch.where(alive, _without_floor(raw["top_keys_weight"], space), 0.0)
            found["top_keys_index"] = torch.where(weight > 0, raw["top_keys_index"], -1)
            found["top_keys_weight"] = weight
        elif name == "pooled_mean":
            rows = torch.full((raw["pooled_sum"].shape[-2],), options.block, device=space.device)
            rows[-1] = space.n_queries - options.block * (len(rows) - 1)
            found[name] = (raw["pooled_sum"] / rows[:, None]).to(space.dtype)
        elif name == "pooled_max":
            found[name] = _without_floor(raw[name], space)
        elif STATISTICS[name].axes == "query":
            found[name] = space.alive(raw[name])
        else:
            found[name] = raw[name].to(space.dtype)
    return {out: found[out] for name in names for out in output_names(name)}


def _without_floor(weight: Tensor, space: Space) -> Tensor:
    """Single weights, zero where they do not exceed the floor that tiles give to hidden keys."""
    return torch.where(weight > 1.01 * 2.0 ** LOG_FLOOR[space.dtype], weight, 0.0)
