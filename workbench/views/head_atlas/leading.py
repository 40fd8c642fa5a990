"""The head that views of a capture begin with: the strongest in a role, by the statistics that were captured.

A role counts where it takes at least half of a head's weight, over a few rows at least: induction first, then the
previous token. Where no head has one, it is the head whose rows look hardest at a single key that is neither the first
nor their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, zeros

from workbench.analysis.profile.measuring import labels_of
from workbench.capture.capture import Capture
from workbench.hooks.sites import Site
from workbench.tokens import visible
from workbench.views.base.spec import Array
from workbench.views.head_atlas.numbers import of_capture

_STRONG = 0.5
_ROLES = {
    "induction": "Of tokens that were there before, {} gives {:.2f} of its weight to what followed the earlier copy",
    "previous": "{} gives {:.2f} of its weight to the token before",
}
_ALONE = "In {} rows look hardest at one key that is neither the first nor their own: {:.2f} on average"
_SOME = 3  # rows below which a share of their weight says little
_ABOVE = 1.001  # how far a weight is above another one that is not the same, rounded otherwise

Head = tuple[Site, int]


@dataclass(frozen=True)
class Leading:
    """A head, as views select it, and a sentence on why it is worth seeing."""

    head: Head
    selection: Mapping[str, Any]
    why: str


def leading(capture: Capture, among: Iterable[Head] | None = None) -> Leading | None:
    """The head of a capture that is most worth seeing; None where its statistics do not tell.

    Args:
        among: the heads to choose from; all if None.
    """
    sites, metrics, means, *_ = of_capture(capture)
    heads = [(site, head) for site in sites for head in range(site.n_heads or 0)]
    wanted = None if among is None else {(site.name, head) for site, head in among}
    there = np.array([wanted is None or (site.name, head) in wanted for site, head in heads], dtype=bool)
    for name, said in _ROLES.items():
        if name in metrics and _rows(capture, name) >= _SOME:
            values = _known(np.where(there, means[list(metrics).index(name)], np.nan))
            if values.max(initial=0.0) >= _STRONG:
                return _made(heads, int(values.argmax()), said, values, _entries(capture))
    alone = _alone(capture)
    each = [float(alone[site.name][head]) if site.name in alone else np.nan for site, head in heads]
    return hardest(heads, np.where(there, each, np.nan), _entries(capture))


def hardest(heads: Sequence[Head], values: Array, entries: int = 1) -> Leading | None:
    """The head whose rows look hardest at a single key, by how hard that is; None where none does."""
    known = _known(values)
    return _made(heads, int(known.argmax()), _ALONE, known, entries) if known.max(initial=0.0) > 0 else None


def _known(values: Array) -> Array:
    return np.where(np.isfinite(values), values, 0.0)


def _rows(capture: Capture, name: str) -> int:
    """How many rows of a site can have a statistic: such as those of tokens with an earlier copy."""
    counts: dict[str, int] = {}
    for forward in capture.forwards:
        for site, held in forward.sites.items():
            if name in held.statistics:
                there = held.statistics[name].isfinite().any(1)
                counts[site] = counts.get(site, 0) + int(there.sum())
    return max(counts.values(), default=0)


def _entries(capture: Capture) -> int:
    """How many sequences the statistics are of."""
    return sum(max((site.shape[0] for site in forward.sites.values()), default=0) for forward in capture.forwards)


def _made(heads: Sequence[Head], at: int, said: str, values: Array, entries: int) -> Leading:
    site, head = heads[at]
    several = len({each.layer for each, _ in heads}) < len({each.name for each, _ in heads})
    selection = {"layer": int(site.layer), "heads": [int(head)], "site": visible(site.name) if several else None}
    why = said.format(visible(labels_of(heads)[at]), values[at]) + (
        f" over {entries:,} sequences" if entries > 1 else ""
    )
    return Leading((site, head), selection, why + (", more than the other heads shown." if len(heads) > 1 else "."))


def _alone(capture: Capture) -> dict[str, Tensor]:
    """By site [head] the mean over rows of the largest weight: 0 where it is on the first key or on the row's own."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    for forward in capture.forwards:
        for name, site in forward.sites.items():
            held = site.statistics
            if "peak" not in held or "sink" not in held or held["peak"].dim() != 3:
                continue
            peak = held["peak"].double().cpu()  # [batch, head, query]
            elsewhere = peak.isfinite()
            for other in ("sink", "current"):
                if other in held:
                    elsewhere &= peak > _ABOVE * held[other].double().cpu()
            sums[name] = sums.get(name, zeros(())) + peak.where(elsewhere, 0.0).sum((0, 2))
            rows[name] = rows.get(name, 0) + peak.shape[0] * peak.shape[2]
    return {name: each / rows[name] for name, each in sums.items()}
