"""Rows that hold several sequences: where each of them lies, as the inputs of a model or of a kernel say it.

Whether a call keeps the sequences apart is not taken from there: `rules` looks at what its mask hides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.masks import as_four, hidden_below

_ENDS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seq_lens", "cu_seqlens")


@dataclass(frozen=True)
class Segment:
    """A sequence in a row: queries `start` to `stop` of row `row`, and the keys that it may have.

    Keys are those of the same row; ends of queries and keys are aligned, as where the first keys come from a cache.
    """

    row: int
    start: int
    stop: int
    key_start: int
    key_stop: int

    @property
    def where(self) -> tuple[int, int, int]:
        """(row, start, stop) of its queries."""
        return self.row, self.start, self.stop


@dataclass(frozen=True)
class Rule:
    """What is hidden inside of a segment: by position (causal, perhaps in a window), or by a mask."""

    causal: bool
    window: int | None
    mask: Tensor | None


def between(ends: Tensor, key_ends: Tensor | None = None) -> tuple[Segment, ...]:
    """Segments of the first row from cumulative lengths 0, n, n + m, …; those that repeat are padding."""
    stops = ends.tolist()
    key_stops = stops if key_ends is None else key_ends.tolist()
    return tuple(
        Segment(0, *pair, *keys)
        for pair, keys in zip(_pairs(stops), _pairs(key_stops), strict=False)
        if pair[0] < pair[1]
    )


def at_starts(starts: Tensor) -> tuple[Segment, ...]:
    """Segments of rows [batch, position] of flags that are set where a sequence begins; () if none holds several."""
    if not bool(starts[:, 1:].any()):
        return ()
    found = []
    for row, flags in enumerate(starts.tolist()):
        borders = [0, *(i for i, flag in enumerate(flags) if flag and i), len(flags)]
        found += [Segment(row, *pair, *pair) for pair in _pairs(borders)]
    return tuple(found)


def restarts(position_ids: Tensor) -> Tensor:
    """Flags [batch, position] where positions do not go on by one."""
    return torch.nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0))


def of_inputs(inputs: Mapping[str, Any], n_rows: int) -> tuple[Segment, ...]:
    """The sequences that a model's inputs, by name, say its rows hold; () where every row is one.

    They are said by cumulative lengths (`cu_seq_lens_q`), `seq_idx`, `position_ids` that start again where no mask is
    given, or a mask [batch, head, query, key] that is block-diagonal.
    """
    ends = next((inputs[name] for name in _ENDS if isinstance(inputs.get(name), Tensor)), None)
    if ends is not None:
        return between(ends) if ends.dim() == 1 else ()
    ids = inputs.get("seq_idx")
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return at_starts(torch.nn.functional.pad(ids.diff(dim=-1) != 0, (1, 0)))
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] == mask.shape[-2]:
        return _blocks(mask.expand(max(n_rows, mask.shape[0]), -1, -1, -1))
    if mask is None and isinstance(positions, Tensor):
        if positions.dim() == 3 and positions.shape[0] == 4:  # those of the text, before those of images
            positions = positions[0]
        if positions.dim() == 2 and positions.shape[1] > 1:
            return at_starts(restarts(positions.expand(max(n_rows, positions.shape[0]), -1)))
    return ()


def block_mask(
    segments: Sequence[Segment], n_queries: int, n_keys: int, *, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """Boolean [1, 1, query, key]: each sequence of the first row sees its own keys."""
    shown = torch.zeros(n_queries, n_keys, dtype=torch.bool, device=device)
    for one in segments:
        n, m = one.stop - one.start, one.key_stop - one.key_start
        shown[one.start : one.stop, one.key_start : one.key_stop] = _by_position(n, m, causal, window, device)
    return shown[None, None]


def rules(mask: Tensor | None, segments: Sequence[Segment]) -> list[Rule] | None:
    """What a call's mask hides inside of each segment; None if it lets some see another.

    Args:
        mask: [batch or 1, head or 1, query, key] and so on, as the call has it.
    """
    if mask is None:
        return [Rule(causal=False, window=None, mask=None)] if len(segments) == 1 else None
    mask = as_four(mask.detach())
    shown = _shown(mask)
    owner = torch.full((1 + max(one.row for one in segments), mask.shape[2]), -1, device=mask.device)
    keys = torch.full((len(owner), mask.shape[3]), -2, device=mask.device)
    if mask.shape[0] not in (1, len(owner)) or any(
        one.stop > mask.shape[2] or one.key_stop > mask.shape[3] for one in segments
    ):
        return None
    for i, one in enumerate(segments):
        owner[one.row, one.start : one.stop] = i
        keys[one.row, one.key_start : one.key_stop] = i
    inside = (owner >= 0)[:, None, :, None]
    if bool((shown & inside & (owner[:, :, None] != keys[:, None, :])[:, None]).any()):
        return None
    return [
        _rule(mask[one.row if len(mask) > 1 else 0], shown[one.row if len(mask) > 1 else 0], one) for one in segments
    ]


def apart(weights: Tensor, segments: Sequence[Segment]) -> bool:
    """Whether weights [batch, head, query, key] have none on another sequence's keys."""
    inside = torch.zeros(weights.shape[0], *weights.shape[2:], dtype=torch.bool, device=weights.device)
    for one in segments:
        if one.row >= len(inside) or one.stop > inside.shape[1] or one.key_stop > inside.shape[2]:
            return False
        inside[one.row, one.start : one.stop, one.key_start : one.key_stop] = True
    return not bool((weights.detach() != 0).any(1).logical_and(~inside).any())


def _rule(mask: Tensor, shown: Tensor, one: Segment) -> Rule:
    part = (slice(None), slice(one.start, one.stop), slice(one.key_start, one.key_stop))
    own, seen = mask[part], shown[part]
    plain = own.dtype == torch.bool or bool((own[seen] == 0).all())
    if plain and bool(seen.all()):
        return Rule(causal=False, window=None, mask=None)
    widest = int(seen[0, -1].sum())
    for window in (None, widest) if plain and widest else ():
        if bool((seen == _by_position(seen.shape[1], seen.shape[2], True, window, seen.device)).all()):
            return Rule(causal=True, window=window, mask=None)
    return Rule(causal=False, window=None, mask=own[None].clone())  # models write their masks anew at each step


def _by_position(n_queries: int, n_keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    i = torch.arange(n_queries, device=device)[:, None] + n_keys - n_queries
    j = torch.arange(n_keys, device=device)[None, :]
    shown = j <= i if causal else torch.ones_like(i + j, dtype=torch.bool)
    return shown if window is None else shown & ((i - j).abs() < window)


def _shown(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > hidden_below(mask.dtype)


def _blocks(mask: Tensor) -> tuple[Segment, ...]:
    """The blocks of a block-diagonal mask [batch, head or 1, query, key]; rows that see nothing are padding."""
    shown, n = _shown(mask).any(1), mask.shape[-1]
    alive, at = shown.any(-1), torch.arange(n, device=mask.device)
    first = torch.where(alive, shown.int().argmax(-1), at)
    last = torch.where(alive, n - 1 - shown.flip(-1).int().argmax(-1), at)
    lowest = first.flip(-1).cummin(-1).values.flip(-1)  # that this row or a later one sees
    highest = torch.nn.functional.pad(last.cummax(-1).values[:, :-1], (1, 0), value=-1)  # that an earlier one sees
    found = at_starts((lowest >= at) & (highest < at))
    flags = alive.tolist()
    real = [one for one in found if any(flags[one.row][one.start : one.stop])]
    return tuple(real) if len({one.row for one in real}) < len(real) else ()


def _pairs(borders: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(borders))
