"""One example of `cross_attention_saliency`: its attention maps held against its two saliencies, and its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.cross_attention.alignment import align, disagreement
from workbench.analysis.cross_attention.correlate import prepared
from workbench.analysis.cross_attention.maps_result import CrossAttention
from workbench.analysis.cross_attention.result import MEASURES, SALIENCIES
from workbench.analysis.saliency.encoder_decoder import EncoderDecoderInput
from workbench.analysis.saliency.normalising import paired_min_max, pool, spread_out, standardised
from workbench.analysis.saliency.result import Saliency
from workbench.analysis.statistics.correlation import correlation
from workbench.errors import WorkbenchError

Pair = tuple[Saliency, Saliency]
"""Saliency of the input, and of the encoder's output."""


@dataclass(frozen=True)
class Compared:
    """The maps of one example that were compared, all output tokens of them.

    Attributes:
        attention: [token, encoder position] the mean over all heads.
        own, theirs: [token, encoder position] saliency of the input, pooled, and of the encoder's output.
        full: [token, position...] saliency of the input at its own cells. tokens: [token, token] saliency of previous
            output tokens, or None.
    """

    attention: Tensor
    own: Tensor
    theirs: Tensor
    full: Tensor
    tokens: Tensor | None


def compare(
    name: str, subject: EncoderDecoderInput, attention: CrossAttention, pair: Pair, pooling: str, normalise: str,
    special_tokens: bool,
) -> tuple[Compared, dict[str, Any]]:  # fmt: skip
    """The maps of one example, and what a study keeps of them.

    Returns:
        The maps, and a dict of "aggregates" (names with kind, layer and head), "alignment_heads", "attention_cells" and
        "saliency_cells" (per map [cell] of the counted tokens, standardised, or None for a constant one),
        "correlations" [aggregate, saliency, measure], "between" [measure], "undefined" and "alignment".
    """
    own, theirs = at_encoder(subject, attention, pair[0], pooling), _encoder_map(attention, pair[1])
    rows = [i for i, odd in enumerate(attention.special) if special_tokens or not odd]
    names = attention.aggregates()
    maps = {aggregate: attention.aggregate(aggregate) for aggregate in names}
    left = [prepared(one[rows], normalise) for one in maps.values()]
    right = [prepared(one[rows], normalise) for one in (own, theirs)]
    undefined = []
    found = torch.full((len(left), 2, len(MEASURES)), torch.nan, dtype=torch.float64)
    for s, y in enumerate(right):
        if y is None:
            undefined.append(f"{name}: {SALIENCIES[s]} saliency is constant, so that no correlation exists")
            continue
        for a, x in enumerate(left):
            if x is not None:
                found[a, s] = torch.tensor([correlation(x, y, measure) for measure in MEASURES])
    for aggregate, x in zip(maps, left, strict=True):
        if x is None:
            undefined.append(f"{name}: the attention map {aggregate} is constant")
    x, y = right
    both = [torch.nan, torch.nan] if x is None or y is None else [correlation(x, y, m) for m in MEASURES]
    guide = maps["alignment heads" if attention.alignment_heads else "all"]
    by_attention, by_saliency = align(guide[rows]), align(own[rows])
    alignment = {
        "token": tuple(rows),
        "token_text": tuple(attention.target_texts[i] for i in rows),
        "attention": by_attention,
        "saliency": by_saliency,
        "disagreement": disagreement(by_attention, by_saliency),
    }
    compared = Compared(maps["all"], own, theirs, _magnitude(pair[0]), pair[0].token_scores)
    return compared, {
        "aggregates": names,
        "alignment_heads": attention.alignment_heads,
        "attention_cells": tuple(left),
        "saliency_cells": tuple(right),
        "correlations": found,
        "between": torch.tensor(both, dtype=torch.float64),
        "undefined": tuple(undefined),
        "alignment": alignment,
    }


def pooled(examples: Sequence[Mapping[str, Any]]) -> Tensor:
    """[aggregate, saliency, measure] over the cells of all examples where both maps vary."""
    n = len(examples[0]["attention_cells"])
    found = torch.full((n, 2, len(MEASURES)), torch.nan, dtype=torch.float64)
    for a in range(n):
        for s in range(2):
            pairs = [(one["attention_cells"][a], one["saliency_cells"][s]) for one in examples]
            both = [(x, y) for x, y in pairs if x is not None and y is not None]
            if both:
                x, y = (torch.cat(parts) for parts in zip(*both, strict=True))
                found[a, s] = torch.tensor([correlation(x, y, measure) for measure in MEASURES])
    return found


def at_encoder(subject: EncoderDecoderInput, attention: CrossAttention, found: Saliency, pooling: str) -> Tensor:
    """Input saliency [token, encoder position] at the positions that the attention map holds.

    Raises:
        WorkbenchError: T' does not divide T, or the map has other positions.
    """
    scores, positions = _magnitude(found), len(attention.kept_positions)
    if found.kind == "spectrogram":
        return pool(scores, positions, length=subject.length, out_length=subject.states.shape[1], how=pooling)
    if found.kind == "tokens" and scores.shape[1] > max(attention.kept_positions):
        scores = scores[:, list(attention.kept_positions)]
    if scores.dim() != 2 or scores.shape[1] != positions:
        raise WorkbenchError(
            f"{found.kind} of {list(scores.shape[1:])} do not stand for {positions} encoder positions",
            shape=scores.shape,
            hint="of images, explain patches",
        )
    return scores


def _encoder_map(attention: CrossAttention, found: Saliency) -> Tensor:
    if found.at != "encoder" or found.scores.shape[1] <= max(attention.kept_positions):
        raise WorkbenchError("the second saliency of a pair is that of the encoder's output", shape=found.scores.shape)
    return _magnitude(found)[:, list(attention.kept_positions)]


def _magnitude(found: Saliency) -> Tensor:
    """Signed scores count by their size."""
    return found.scores.abs() if found.signed else found.scores


def normalised_maps(
    subject: EncoderDecoderInput, compared: Compared, seed: int
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Per order the map of every output token over the cells of the input, standardised and scaled to 0 … 1 as in SPES.

    A sentence's ranking of cells is their mean over tokens. The second of a pair is the map of previous output tokens,
    scaled together with the first, where saliency has one. The map "random" is one for all tokens.
    """
    full = compared.full
    positions = tuple(full.shape[1:])
    step = subject.length // subject.states.shape[1] if subject.kind == "spectrogram" else 1
    if compared.own.shape[1:] != full.shape[1:] and subject.kind == "tokens":
        full = compared.own
    random = torch.rand(positions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    random = random[: full.shape[1]]

    def of(maps: Tensor) -> tuple[Tensor, Tensor | None]:
        wide = maps if subject.kind != "spectrogram" else spread_out(maps, positions, step)
        return paired_min_max(standardised(wide), None)

    causal = None if compared.tokens is None else torch.ones_like(compared.tokens, dtype=torch.bool).tril(-1)
    tokens = None if compared.tokens is None else standardised(compared.tokens, causal)
    return {
        "attention": of(compared.attention),
        "input saliency": paired_min_max(standardised(full), tokens, causal),
        "pooled input saliency": of(compared.own),
        "encoder-output saliency": of(compared.theirs),
        "random": paired_min_max(random[None], None),
    }


def drawn(
    name: str,
    one: Mapping[str, Any],
    attention: CrossAttention,
    pair: Pair,
    compared: Compared,
) -> dict[str, Any]:
    """What views draw of one example."""
    audio = one.get("audio")
    return {
        "name": name,
        "target_texts": attention.target_texts,
        "special": attention.special,
        "picture": pair[0].picture,
        "kind": pair[0].kind,
        "grid": pair[0].grid,
        "position_texts": attention.position_texts,
        "input_saliency": pair[0].scores,
        "input_error": pair[0].standard_error,
        "pooled_input_saliency": compared.own,
        "encoder_saliency": compared.theirs,
        "encoder_error": pair[1].standard_error[:, list(attention.kept_positions)],
        "attention": attention.maps,
        "layers": attention.layers,
        "seconds_per_position": attention.seconds_per_position,
        "seconds_per_input_position": pair[0].seconds_per_position,
        "n_masks": (pair[0].n_masks, pair[1].n_masks),
        "audio": None if audio is None else torch.as_tensor(audio).float().flatten(),
        "sampling_rate": None if one.get("sampling_rate") is None else int(one["sampling_rate"]),
    }
