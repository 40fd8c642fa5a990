"""All patterns of a capture, pooled to one size and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.analysis.atlas.pooling import pool
from workbench.analysis.profile.measuring import choose_sites, labels_of, locate
from workbench.analysis.profile.places import Places
from workbench.hooks.sites import Site

if TYPE_CHECKING:
    from workbench.capture.capture import Capture


@dataclass
class Gathered:
    """All patterns of a capture: heads of all sites beside each other, batch rows of all forwards below each other."""

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    labels: tuple[str, ...]
    places: Places
    maps: Tensor
    scores: Tensor


def gather(
    cap: Capture,
    size: int,
    grid: tuple[int, int] | str | None,
    prefix: int | None,
    sites: Sequence[str | int | Site] | None,
) -> Gathered:
    """Pool and measure all patterns of a capture."""
    chosen, _ = choose_sites(cap, sites)
    places = locate(cap, chosen, grid, prefix)
    seen = [[pool(call[site].pattern, places, size) for call in cap.calls] for site in chosen]
    maps = torch.cat([torch.cat([part.maps for part in parts]) for parts in seen], 1)
    scores = torch.cat([torch.cat([part.scores for part in parts]) for parts in seen], 1)
    rows = [(site, h) for site, parts in zip(chosen, seen, strict=True) for h in range(parts[0].maps.shape[1])]
    return Gathered(
        tuple(s.name for s, _ in rows),
        tuple(s.layer for s, _ in rows),
        tuple(h for _, h in rows),
        labels_of(rows),
        places,
        maps,
        scores,
    )
