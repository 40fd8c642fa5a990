"""HeadVis' folder of heads over a corpus, which Neuronpedia imports: numbers of each head, and its strongest windows.

Form: `data_pipeline.py` of HeadVis (Anthropic 2026, transformer-circuits.pub/2026/headvis). `pipeline_config` is what
Neuronpedia's importers ask for besides.
"""

from __future__ import annotations

import bisect
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.analysis.corpus.measuring import MEANINGS as OF_SCORES
from workbench.analysis.head_scores.prompts import self_attention
from workbench.errors import FormatError, WorkbenchError
from workbench.inputs import device_for_inputs, without_cache
from workbench.session.workbench import Workbench
from workbench.storage import disk
from workbench.storage.parts import parse
from workbench.tokens import piece, utf8

if TYPE_CHECKING:
    import pandas as pd

CONFIG, NUMBERS = "config.json", "scatter_data.json"
# What Neuronpedia has columns for, and what only HeadVis' scatter shows.
MEANINGS = {
    "self_attention_score": "mean weight of a query on itself",
    "prev_token_score": OF_SCORES["previous"],
    "pattern_entropy": "mean entropy of a row, in nats",
    "qk_distance": "mean distance from a query to its keys, by weight, in tokens",
    "qk_distance_variance": "variance of that distance",
    "induction_score": OF_SCORES["induction"],
    "duplicate_token_score": OF_SCORES["duplicate"],
    "sink_score": OF_SCORES["sink"],
    "retrieval_score": OF_SCORES["retrieval"],
    "streaming_score": OF_SCORES["streaming"],
    "copying_score": OF_SCORES["copying"],
}
_EDGES = [0, *(2**i for i in range(13))]  # of distances
_KEPT, _LEAST = 8, 0.005  # weights of a row that are written, and from how much on
_RANKED = 50  # tokens
_DIGITS = 4


def write_headvis(
    folder: str | Path,
    rows: Sequence[Mapping[str, Any]],
    sequences: Sequence[Sequence[Mapping[str, Any]]],
    run: Mapping[str, Any],
) -> Path:
    """Write the folder. See `CorpusAtlas.to_headvis`.

    Args:
        rows: of each head: layer, head, and the numbers of `MEANINGS`; those that are not finite are not known.
        sequences: of each head, as `strongest_windows` has them.
        run: what Neuronpedia asks for: model_name, dataset_name, n_sequences, seq_len, dtype, attn_implementation.
    """
    heads = [(row["layer"], row["head"]) for row in rows]
    twice = [f"L{layer}H{head}" for (layer, head), n in Counter(heads).items() if n > 1]
    if twice:
        raise WorkbenchError(f"HeadVis names heads by layer and number, and {twice[0]} are several heads of this model")
    target = disk.folder(folder)
    for inner in ("heads", "attributions"):
        disk.folder(target / inner)
    for (layer, head), own in zip(heads, sequences, strict=True):
        _write(target / "heads" / f"L{layer}H{head}.json", _of_head(own))
    _write(target / "server_config.json", {})
    _write(target / "attributions" / "manifest.json", {})
    known = [{name: one if math.isfinite(one) else None for name, one in row.items()} for row in rows]
    _write(target / NUMBERS, known)
    _write(target / CONFIG, _config(heads, run))
    return target


def read_headvis(folder: str | Path) -> pd.DataFrame:
    """The numbers of each head in such a folder, ours or another's: layer, head, and a column for each metric.

    Raises:
        FormatError: it is no such folder.
    """
    import pandas as pd

    where = disk.readable(folder)
    try:
        raw = {name: disk.content(where / name) for name in (CONFIG, NUMBERS)}
    except (OSError, ValueError) as error:  # a name with characters that no path may have is a ValueError
        raise FormatError(f"{where.name!r} is no folder of HeadVis: {getattr(error, 'strerror', error)}") from None
    names = [one.text() for one in parse(raw[CONFIG], CONFIG)["metrics"].list()]
    rows = []
    for row in parse(raw[NUMBERS], NUMBERS).list():
        found: dict[str, Any] = {name: row[name].integer(0) for name in ("layer", "head")}
        for name in names:
            number = row.get(name)
            found[name] = math.nan if number is None else number.number()
        rows.append(found)
    return pd.DataFrame(rows, columns=["layer", "head", *names])


def _config(heads: Sequence[tuple[int, int]], run: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: utf8(one) if isinstance(one, str) else one for name, one in run.items()}
    return {
        "model_name": told["model_name"], "dataset_name": told["dataset_name"], "heads": heads,
        "n_layers": len({layer for layer, _ in heads}), "n_heads": 1 + max(head for _, head in heads),
        "n_intervals": 1, "metrics": list(MEANINGS), "metric_descriptions": MEANINGS,
        "head_data_pattern": "L{layer}H{head}.json", "has_umap": False, "umap_heads": [],
        "custom_plots": [{"key": "qk_distance_histogram", "label": "Distance"}],
        "custom_tables": [
            {"key": "top_query_tokens", "label": "Query tokens"}, {"key": "top_key_tokens", "label": "Key tokens"},
        ],
        "statistics_display": {"n_samples": {"label": "Windows", "format": "default"}},
        "pipeline_config": told,
    }  # fmt: skip


def _of_head(sequences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a head's file holds."""
    bins = [0.0] * (len(_EDGES) - 1)
    tokens: dict[str, dict[str, float]] = {"query": defaultdict(float), "key": defaultdict(float)}
    for one in sequences:
        for place, weight in zip(one["attention_indices"], one["attention_values"], strict=True):
            query, key = divmod(place, one["seq_len"])
            bins[min(bisect.bisect_right(_EDGES, abs(query - key)) - 1, len(bins) - 1)] += weight
            tokens["query"][one["tokens"][query]] += weight
            tokens["key"][one["tokens"][key]] += weight
    ranked = {
        f"top_{side}_tokens": [
            {"token": token, "weight": round(weight, _DIGITS)}
            for token, weight in sorted(found.items(), key=lambda pair: -pair[1])[:_RANKED]
        ]
        for side, found in tokens.items()
    }
    return {
        "sequences": sequences, **ranked, "histogram": {}, "statistics": {"n_samples": len(sequences)},
        "qk_distance_histogram": {"bin_edges": _EDGES, "bin_values": [round(n, _DIGITS) for n in bins]},
    }  # fmt: skip


def strongest_windows(
    wb: Workbench, heads: Sequence[tuple[str, int]], windows: Tensor, ids: Tensor
) -> list[list[dict[str, Any]]]:
    """The windows of each head's examples, with the largest weights of their rows: the model is run on them again.

    Args:
        heads: site and number of each. windows: [head, example] numbers of windows; −1 where there is none.
        ids: [head, example, position] their tokens.
    """
    wanted: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)  # heads and their examples, by window
    for head, example in (windows >= 0).nonzero().tolist():
        wanted[tuple(ids[head, example].tolist())].append((head, example))
    found: list[dict[int, dict[str, Any]]] = [{} for _ in heads]
    names: list[str] | None = None
    for window, asked in wanted.items():
        row = torch.tensor([window], device=device_for_inputs(wb.model))
        names = self_attention(wb, row[0]) if names is None else names
        with torch.no_grad(), wb.capture((), names, limit=None) as cap:
            wb.model(input_ids=row, **without_cache(wb.model))
        tokens = [utf8(str(i) if wb.tokenizer is None else piece(wb.tokenizer, i)) for i in window]
        for head, example in asked:
            site, number = heads[head]
            weights = cap[site].pattern.dense(heads=[number])[0, 0].float().cpu()
            found[head][example] = _sparse(weights, tokens, int(windows[head, example]))
    return [[own[example] for example in sorted(own)] for own in found]


def _sparse(weights: Tensor, tokens: list[str], window: int) -> dict[str, Any]:
    """A map [query, key] as HeadVis has it: the largest weights of each row, by `query · length + key`."""
    n = len(tokens)
    most = weights.topk(min(_KEPT, n), dim=-1)
    kept = most.values >= _LEAST
    places = (torch.arange(n)[:, None] * n + most.indices)[kept]
    order = places.argsort()
    elsewhere = weights[1:, 1:].masked_fill(torch.eye(n - 1, dtype=torch.bool), 0)
    return {
        "sequence_id": window, "interval": 1, "tokens": tokens, "seq_len": n,
        "attention_indices": places[order].tolist(),
        "attention_values": [round(weight, _DIGITS) for weight in most.values[kept][order].tolist()],
        "max_activation": round(float(elsewhere.max()), _DIGITS),
    }  # fmt: skip


def _write(path: Path, said: Any) -> None:
    disk.write(path, json.dumps(said, ensure_ascii=True, allow_nan=False) + "\n")
