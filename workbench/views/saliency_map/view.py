"""Saliency map: what a decoder attends to beside what its output depends on, over a spectrogram, with its sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.analysis.cross_attention.correlate import prepared
from workbench.analysis.statistics.correlation import correlation
from workbench.errors import ReportError
from workbench.tokens import visible as shown
from workbench.views.base.selection import SharedSelection, inputs_of
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View
from workbench.views.saliency_map.picture import draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS = 2_000_000  # of a map over time and frequency, and of single heads; above it a map is cut, and says so


class SaliencyMap(View):
    """See `saliency_map`."""

    def picture(self, figure: Figure) -> None:
        draw(figure, self.spec, self.chosen)


def saliency_map(
    maps: Mapping[str, Any],
    tokens: Sequence[str],
    *,
    spectrogram: Any = None,
    strips: Mapping[str, Any] | None = None,
    errors: Mapping[str, Any] | None = None,
    attention: Any = None,
    layers: Sequence[int] | None = None,
    alignment_heads: Sequence[tuple[int, int]] = (),
    special: Sequence[bool] | None = None,
    visible: Sequence[int] = (),
    seconds: float | None = None,
    position_texts: Sequence[str] = (),
    spans: Mapping[str, Any] | None = None,
    audio: Any = None,
    sampling_rate: int | None = None,
    unit: str = "",
    frequency: str = "mel channel",
    title: str = "Saliency",
    caption: str | None = None,
    notes: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    selection: SharedSelection | None = None,
) -> SaliencyMap:
    """Maps of output tokens by input positions: beside cross-attention, over a spectrogram, and the difference.

    Args:
        maps: {name: [token, position]}, or [token, time, frequency] over a spectrogram.
        tokens: texts of the output tokens.
        spectrogram: [time, frequency].
        strips: of maps over time and frequency, how they look over encoder positions, [token, position]; the largest
            cell of each position if not given.
        errors: standard errors of the maps over positions, or of the strips: [token, position].
        attention: [layer, head, token, position] cross-attention. layers: their numbers. alignment_heads: (layer, head)
            pairs that are marked.
        special: [token] whether a token is special; such rows do not count in correlations.
        visible: [token] how many positions each token can depend on: those before it, in a causal map. Others are not
            coloured.
        seconds: duration of a frame of the spectrogram, or of a position where there is none. None: they are counted.
        position_texts: texts of input tokens.
        spans: {name: [token, 2]} begin and end of each token along the input in seconds (or positions), NaN where not
            known: of "attention", of one of the maps, or of anything else, which is drawn over the spectrogram.
        audio: [sample] within ±1. sampling_rate: samples per second.
        unit: of the maps. frequency: what the spectrogram's second axis counts.

    Raises:
        ReportError: no token or map, shapes that do not fit, or values that are not finite.

    >>> found = saliency_map({"saliency": [[0.0, 1.0], [2.0, 0.5]]}, ["a", "b"], attention=[[[[0.1, 0.9], [0.8, 0.2]]]])
    >>> found.data()[["token", "attention peak at", "saliency peak at"]].values.tolist()
    [['a', 1.0, 1.0], ['b', 0.0, 0.0]]
    """
    n = len(tokens)
    if not n or not maps:
        raise ReportError("there is nothing to show", hint="pass one map at least, with one row per output token")
    picture = None if spectrogram is None else _array("the spectrogram", spectrogram, 2)
    weights = None if attention is None else _array("attention", attention, 4)
    held = {name: _array(name, values, *((2, 3) if picture is not None else (2,))) for name, values in maps.items()}
    rows = {name: _array(name, values, 2) for name, values in (strips or {}).items()}
    bad = {name: _array(f"the error of {name}", values, 2) for name, values in (errors or {}).items()}
    for name, array in {**held, **rows, **bad}.items():
        if name not in held or len(array) != n:
            raise ReportError(f"{name} does not fit {n} tokens and the maps {', '.join(held)}", shape=array.shape)
    frames = None if picture is None else len(picture)
    positions = _positions(weights, held, rows, frames)
    per = 1 if frames is None else -(-frames // positions)
    step = 1.0 if seconds is None else float(seconds)
    hidden = _hidden(visible, n, positions, alone=weights is None and picture is None)
    said = list(notes)
    blocks: dict[str, Any] = {}
    about = []
    for i, (name, array) in enumerate(held.items()):
        if array.ndim == 3 and picture is not None and array.shape[1:] != picture.shape:
            raise ReportError(f"{name} does not fit the spectrogram of {list(picture.shape)}", shape=array.shape)
        fits = rows.get(name, array if array.ndim == 2 else None)
        strip = _largest(array, positions, per) if fits is None else fits
        if strip.shape != (n, positions):
            raise ReportError(f"{name} does not fit {n} tokens and {positions} positions", shape=array.shape)
        blocks[f"strip{i}"] = np.where(hidden, np.nan, strip).astype(np.float32)
        if name in bad:
            if bad[name].shape != strip.shape:
                raise ReportError(f"the error of {name} has another shape than its map", shape=bad[name].shape)
            blocks[f"error{i}"] = bad[name].astype(np.float32)
        fact = {"label": name, "unit": unit, "signed": bool(array.min() < 0), "error": name in bad, "cells": None}
        if array.ndim == 3:
            blocks[f"cells{i}"], fact["cells"], note = _packed(name, array)
            said += note
        about.append(fact)
    if picture is not None:
        low, high = float(picture.min()), float(picture.max())
        blocks["picture"] = np.round((picture - low) / ((high - low) or 1.0) * 255).astype(np.uint8)
    facts: dict[str, Any] = {
        "tokens": [shown(token) for token in tokens],
        "special": [bool(odd) for odd in (special if special is not None else [False] * n)],
        "positions": positions,
        "step": step * per,
        "unit": "s" if seconds is not None else "frame" if frames is not None else "position",
        "names": [shown(text) for text in position_texts],
        "maps": about,
        "picture": None if picture is None else {"step": step, "label": frequency},
        "attention": None,
        "spans": list(spans or {}),
        "rate": None,
    }
    if len(facts["special"]) != n or (position_texts and len(position_texts) != positions):
        raise ReportError(f"special and position_texts do not fit {n} tokens and {positions} positions")
    if weights is not None:
        facts["attention"], blocks["attention"], note = _heads(weights, layers, alignment_heads, n, positions)
        said += note
    if spans:
        blocks["spans"] = _spans(spans, n)
    if audio is not None:
        facts["rate"], blocks["audio"] = _sound(audio, sampling_rate)
    spec = ViewSpec(
        kind="saliency_map",
        title=title,
        caption=caption or f"{n} output tokens over {positions:,} positions: {', '.join(maps)}.",
        facts=facts,
        blocks=blocks,
        table=_table(facts, blocks, {name: dict(spans or {})[name] for name in facts["spans"]}),
        notes=tuple(said),
        provenance=provenance or {},
        inputs=inputs_of(facts["tokens"]),
    )
    view = SaliencyMap(spec, selection)
    view.size = (9.0, (2.2 if picture is not None else 0.3) + len(_panels(facts)) * (0.5 + max(0.35, 0.16 * n)) + 0.5)
    return view


def _panels(facts: Mapping[str, Any]) -> list[str]:
    return ["map"] if facts["attention"] is None else ["attention", "map", "difference"]


def _array(name: str, values: Any, *axes: int) -> np.ndarray:
    array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)
    if array.ndim not in axes or not array.size:
        raise ReportError(f"{name} has {' or '.join(map(str, axes))} axes and is not empty", shape=array.shape)
    if not np.isfinite(array).all():
        raise ReportError(f"{name} holds values that are not finite", shape=array.shape)
    return array


def _positions(
    weights: np.ndarray | None, maps: Mapping[str, np.ndarray], strips: Mapping[str, np.ndarray], frames: int | None
) -> int:
    """How many encoder positions the strips have; all have as many."""
    known = {a.shape[1] for a in strips.values()} | {
        a.shape[1] for name, a in maps.items() if a.ndim == 2 and name not in strips
    }
    if weights is not None:
        known.add(weights.shape[3])
    if not known and frames is not None:
        known = {frames}
    if len(known) != 1:
        raise ReportError(f"the maps have {', '.join(map(str, sorted(known)))} positions", hint="pool them to the same")
    (found,) = known
    if frames is not None and found > frames:
        raise ReportError(f"{found} positions are more than the {frames} frames of the spectrogram")
    return found


def _hidden(visible: Sequence[int], n: int, positions: int, *, alone: bool) -> np.ndarray:
    """[token, position] whether a token cannot depend on a position."""
    limits = np.asarray(visible if len(visible) else [positions] * n)
    if len(visible) and not alone:
        raise ReportError("a causal map stands beside no attention and over no spectrogram")
    if limits.shape != (n,) or limits.min() < 1 or limits.max() > positions:
        raise ReportError(
            f"visible says for each of {n} tokens how many of {positions} positions it sees, one at least"
        )
    found: np.ndarray = np.arange(positions) >= limits[:, None]
    return found


def _largest(array: np.ndarray, positions: int, per: int) -> np.ndarray:
    """[token, position] the largest cell of each position, from [token, time, frequency]."""
    best = array.max(2)
    lacking = max(0, positions * per - best.shape[1])
    wide = np.pad(best, ((0, 0), (0, lacking)), constant_values=-np.inf)[:, : positions * per]
    found: np.ndarray = wide.reshape(len(array), positions, per).max(2)
    return found


def _packed(name: str, array: np.ndarray) -> tuple[np.ndarray, dict[str, Any], list[str]]:
    """Cells in 16 bits between the ends, and over blocks of frames where there are too many."""
    notes = []
    block = -(-array.size // CELLS)
    if block > 1:
        n, frames, bins = array.shape
        wide = np.pad(array, ((0, 0), (0, -frames % block), (0, 0)), constant_values=-np.inf)
        array = wide.reshape(n, -1, block, bins).max(2)
        notes.append(f"Over the spectrogram, {name} is the largest of every {block} frames.")
    low, high = float(array.min()), float(array.max())
    cells = np.round((array - low) / ((high - low) or 1.0) * 65535).astype(np.uint16)
    return cells, {"low": low, "high": high, "block": block}, notes


def _heads(
    weights: np.ndarray, layers: Sequence[int] | None, marked: Sequence[tuple[int, int]], n: int, positions: int
) -> tuple[dict[str, Any], np.ndarray, list[str]]:
    if weights.shape[2:] != (n, positions):
        raise ReportError(f"attention does not fit {n} tokens and {positions} positions", shape=weights.shape)
    numbers = list(range(len(weights))) if layers is None else [int(layer) for layer in layers]
    if len(numbers) != len(weights):
        raise ReportError(f"there are {len(numbers)} layers for {len(weights)} of attention", shape=weights.shape)
    notes = []
    single = weights.size <= CELLS
    signed = bool(weights.min() < 0)
    kept = weights if single else weights.mean(1, keepdims=True)
    if not single:
        notes.append("Single heads are too many to be shown here: attention is the mean of the heads of each layer.")
    about = {
        "layers": numbers,
        "heads": weights.shape[1] if single else 0,
        "alignment": [[int(a), int(b)] for a, b in marked] if single else [],
        "signed": signed,
    }
    return about, kept.astype(np.float32), notes


def _spans(spans: Mapping[str, Any], n: int) -> np.ndarray:
    found = []
    for name, values in spans.items():
        array = np.asarray(values, dtype=np.float32)
        if array.shape != (n, 2):
            raise ReportError(f"the spans of {name} are [token, 2] for {n} tokens", shape=array.shape)
        found.append(array)
    return np.stack(found)


def _sound(audio: Any, rate: int | None) -> tuple[int, np.ndarray]:
    samples = np.asarray(audio.detach().cpu() if isinstance(audio, torch.Tensor) else audio, dtype=np.float64).ravel()
    if rate is None or not 1000 <= int(rate) <= 400_000:
        raise ReportError(f"sampling_rate is {rate}", hint="pass how many samples of the audio make a second")
    if not samples.size or not np.isfinite(samples).all():
        raise ReportError("the audio is empty or not finite", shape=samples.shape)
    return int(rate), np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)


def _table(facts: Mapping[str, Any], blocks: Mapping[str, Any], spans: Mapping[str, Any]) -> dict[str, Any]:
    """One row per token: where attention and maps are largest, how they correlate, and the spans."""
    n = len(facts["tokens"])
    table: dict[str, Any] = {"position": np.arange(n, dtype=np.int32), "token": facts["tokens"]}
    mean = blocks["attention"].mean((0, 1)) if facts["attention"] else None
    peaks = {} if mean is None else {"attention": mean}
    for i, about in enumerate(facts["maps"]):
        peaks[about["label"]] = blocks[f"strip{i}"]
    for name, rows in peaks.items():
        table[f"{name} peak at"] = np.nanargmax(rows, 1) * facts["step"]
        table[f"{name} peak"] = np.nanmax(rows, 1)
    if mean is not None:
        for i, about in enumerate(facts["maps"]):
            pairs = zip(mean, blocks[f"strip{i}"], strict=True)
            table[f"r of attention and {about['label']}"] = np.array([_pearson(a, b) for a, b in pairs])
    for name, values in spans.items():
        ends = np.asarray(values, dtype=np.float64)
        table[f"{name} begins"], table[f"{name} ends"] = ends[:, 0], ends[:, 1]
    return table


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    """NaN where a row is constant."""
    x, y = (prepared(torch.from_numpy(np.asarray(row, dtype=np.float64))[None], "token") for row in (a, b))
    return float("nan") if x is None or y is None else correlation(x, y, "pearson")
