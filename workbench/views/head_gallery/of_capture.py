"""Every head's pattern of a capture as a small map: the largest weight of each block of tokens, a strip at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.analysis.circuits.roles import HeadRoles
from workbench.analysis.profile.measuring import labels_of
from workbench.capture.capture import Capture
from workbench.errors import CaptureError, ReportError
from workbench.hooks.sites import Site
from workbench.kernels.patterns import Pattern
from workbench.views.attention_pattern.pyramid import Bytes, quantise
from workbench.views.attention_pattern.sources import Source, of_batch, sources_of
from workbench.views.base.spec import Array
from workbench.views.head_atlas.leading import Leading, leading
from workbench.views.head_atlas.numbers import Scores, of_capture, of_scores

FEW = 300
"""Heads up to which maps have `LARGER` cells along an edge, beyond it `SMALLER`: a small map has no more pixels."""
LARGER, SMALLER = 88, 44
_STRIP_CELLS = 1 << 20


@dataclass(frozen=True)
class Wall:
    """The heads of a capture, as a gallery takes them.

    Attributes:
        maps: [head, row, column] bytes, see `attention_pattern.pyramid`. block: tokens along an edge of a cell.
        shape: queries and keys. heads: site and number. tokens: texts of queries and keys, where they are known.
        roles: of each head in a word or two, "" for none; None where no roles are known.
        begins: the head to begin with.
    """

    maps: Bytes
    block: int
    shape: tuple[int, int]
    heads: list[tuple[Site, int]]
    labels: tuple[str, ...]
    tokens: tuple[list[str] | None, list[str] | None]
    numbers: dict[str, Array]
    roles: list[str] | None
    begins: Leading | None
    notes: tuple[str, ...]


def wall_of(
    capture: Capture, sites: Any, batch: int, scores: Mapping[str, Scores] | None, roles: HeadRoles | None
) -> Wall:
    """The maps and numbers of all heads of one forward.

    Raises:
        ReportError: the capture is empty, or no such batch entry. CaptureError: several forwards, or no pattern kept.
    """
    names = None if sites is None else {capture[each].site.name for each in _several(sites)}
    found = [s for s in sources_of(capture, None, None, batch, None, None) if names is None or s.site.name in names]
    kept = [each for each in found if each.pattern is not None]
    if not kept:
        raise CaptureError(f"no pattern was kept: {found[0].missing}", hint="capture with queries_keys=True")
    (shape, _), *_ = Counter(each.shape[2:] for each in kept for _ in each.heads).most_common()
    shown = [each for each in kept if each.shape[2:] == shape]
    heads = [(each.site, head) for each in shown for head in each.heads]
    edge = LARGER if len(heads) <= FEW else SMALLER
    block = -(-max(shape) // edge)
    maps, unknown = [], []
    for each in shown:
        assert each.pattern is not None
        cells, broken = pooled(each.pattern, each.heads, batch, block)
        maps.append(cells)
        unknown += [f"L{each.site.layer}H{head}" for head, bad in zip(each.heads, broken, strict=True) if bad]
    return Wall(
        maps=np.concatenate(maps),
        block=block,
        shape=shape,
        heads=heads,
        labels=labels_of(heads),
        tokens=(shown[0].queries, shown[0].keys),
        numbers=_numbers(capture, heads, scores),
        roles=None if roles is None else _roles(roles, labels_of(heads)),
        begins=leading(capture, heads),
        notes=(*of_batch(shown[0].shape[0], batch), *_left_out(found, shown), *_not_numbers(unknown)),
    )


def _several(sites: Any) -> Sequence[Any]:
    return [sites] if isinstance(sites, (str, int, Site)) else list(sites)


def pooled(pattern: Pattern, heads: Sequence[int], batch: int, block: int) -> tuple[Bytes, list[bool]]:
    """[head, row, column] bytes of the largest weight in each block, and which heads have weights that are no numbers.

    Only strips of rows are ever held. A signed or unnormalised pattern is taken as |A| / Σ|A| per row; a block with
    weights that are no numbers is one that is not seen.
    """
    pattern = pattern.magnitude() if pattern.by_magnitude else pattern
    _, _, queries, keys = pattern.shape
    entry, chosen = slice(batch, batch + 1), torch.as_tensor(list(heads))
    found = np.zeros((len(heads), -(-queries // block), -(-keys // block)), np.uint8)
    broken = torch.zeros(len(heads), dtype=torch.bool)
    step = max(1, _STRIP_CELLS // max(1, keys * len(heads) * block)) * block
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        columns = slice(0, max(1, min(keys, pattern.mask.key_range(rows)[1])))
        weights = pattern.tile_of(entry, rows, columns, heads)[0].detach().float().cpu()
        cells = _in_blocks(weights, block)
        broken |= ~cells.isfinite().flatten(1).all(1)
        seen = pattern.mask.visible(rows, columns, entry, chosen)
        if seen is not None:
            there = seen.cpu()[0] if seen.dim() == 4 else seen.cpu()  # of one entry, and of each head or of all
            there = there.expand(len(there) if there.dim() == 3 else 1, *weights.shape[1:])
            cells = cells.masked_fill(~_in_blocks(there, block), torch.nan)
        cells = cells.masked_fill(~cells.isfinite(), torch.nan)
        found[:, start // block : start // block + cells.shape[1], : cells.shape[2]] = quantise(cells.numpy())
    return found, broken.tolist()


def _in_blocks(values: Tensor, block: int) -> Tensor:
    """[head, row, column] the largest value of each block; NaN where it holds one."""
    if block == 1:
        return values
    padded = pad(values, (0, -values.shape[2] % block, 0, -values.shape[1] % block))
    return padded.unflatten(1, (-1, block)).amax(2).unflatten(2, (-1, block)).amax(-1)


def _numbers(capture: Capture, heads: Sequence[tuple[Site, int]], scores: Any) -> dict[str, Array]:
    """The means of the capture's statistics, and scores that are given in the atlas' forms."""
    made: dict[str, Array] = {}
    sites, metrics, values, *_ = of_capture(capture)
    for label, row in zip((m.label for m in metrics.values()), values, strict=True):
        made[label] = _of(heads, sites, row)
    if scores:
        sites, metrics, values, *_ = of_scores(scores, "", None, "self")
        for label, row in zip(metrics, values, strict=True):
            made[label] = _of(heads, sites, row)
            if not np.isfinite(made[label]).any():
                raise ReportError(f"the scores {label!r} are of none of the heads that are shown")
    return made


def _of(heads: Sequence[tuple[Site, int]], sites: Sequence[Site], row: Array) -> Array:
    """A number for each head; sites without a name are known by their layer."""
    by_head: dict[tuple[Any, int], float] = {}
    at = 0
    for site in sites:
        for head in range(site.n_heads or 0):
            by_head[site.name or site.layer, head] = float(row[at])
            at += 1
    either = [by_head.get((site.name, head), by_head.get((site.layer, head), np.nan)) for site, head in heads]
    return np.array(either, dtype=np.float64)


def _roles(roles: HeadRoles, labels: Sequence[str]) -> list[str]:
    known = {head: ", ".join(names) for head, names in zip(roles.heads, roles.roles, strict=True)}
    return [known.get(label, "") for label in labels]


def _left_out(found: Sequence[Source], shown: Sequence[Source]) -> tuple[str, ...]:
    left = [each for each in found if each not in shown]
    if not left:
        return ()
    names = ", ".join(each.site.name for each in left[:4]) + (" and others" if len(left) > 4 else "")
    sizes = "x".join(map(str, shown[0].shape[2:]))
    return (f"Left out are {len(left)} sites without a map of {sizes} tokens: {names}. sites= shows them.",)


def _not_numbers(heads: Sequence[str]) -> tuple[str, ...]:
    if not heads:
        return ()
    named = ", ".join(heads[:8]) + (f" and {len(heads) - 8:,} more" if len(heads) > 8 else "")
    return (f"Weights that are not numbers, which the model gave, are grey: {named}.",)
