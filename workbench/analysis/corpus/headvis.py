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
from workbench.errors import FileError, FormatError, WorkbenchError
from workbench.inputs import device_for_inputs, without_cache
from workbench.session.workbench import Workbench
from workbench.storage import disk
from workbench.storage.parts import parse
from workbench.tokens import piece, utf8

if TYPE_CHECKING:
    import pandas as pd

    from workbench.analysis.corpus.result import CorpusAtlas

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
_SCORES = {
    "prev_token_score": "previous", "induction_score": "induction", "duplicate_token_score": "duplicate",
    "sink_score": "sink", "retrieval_score": "retrieval", "streaming_score": "streaming",
}  # fmt: skip
_EDGES = [0, *(2**i for i in range(13))]  # of distances
_KEPT, _LEAST = 8, 0.005  # weights of a row that are written, and from how much on
_RANKED = 50  # tokens
_DIGITS = 4


def numbers(atlas: CorpusAtlas) -> list[dict[str, Any]]:
    """A row of each head: layer, head, and the numbers of `MEANINGS`; None where one is not known."""
    frame, n = atlas.table, atlas.entropies.sum(1).double()
    current, entropy, distance, squared = atlas.totals.double() / n
    columns = {
        "self_attention_score": current, "pattern_entropy": entropy, "qk_distance": distance,
        "qk_distance_variance": (squared - distance.square()).clamp_min(0), "copying_score": atlas.copying,
    }  # fmt: skip
    each = {name: found.tolist() for name, found in columns.items()}
    each |= {name: frame[score].tolist() for name, score in _SCORES.items()}
    return [
        {"layer": atlas.layers[h], "head": atlas.numbers[h]} | {name: _known(each[name][h]) for name in MEANINGS}
        for h in range(len(atlas.layers))
    ]


def write_headvis(folder: str | Path, atlas: CorpusAtlas, wb: Workbench | None, *, model: str, dataset: str) -> Path:
    """Write the folder. See `CorpusAtlas.to_headvis`."""
    heads = list(zip(atlas.layers, atlas.numbers, strict=True))
    twice = [f"L{layer}H{head}" for (layer, head), n in Counter(heads).items() if n > 1]
    if twice:
        raise WorkbenchError(f"HeadVis names heads by layer and number, and {twice[0]} are several heads of this model")
    sequences = [[] for _ in heads] if wb is None else _strongest(atlas, wb)
    target = Path(folder)
    try:
        for one in (target, target / "heads", target / "attributions"):
            one.mkdir(exist_ok=True)
    except OSError as error:
        raise FileError(f"{target.name} is no folder that can be made: {error.strerror}") from None
    for (layer, head), own in zip(heads, sequences, strict=True):
        _write(target / "heads" / f"L{layer}H{head}.json", _of_head(own))
    _write(target / "server_config.json", {})
    _write(target / "attributions" / "manifest.json", {})
    _write(target / NUMBERS, numbers(atlas))
    _write(target / CONFIG, _config(atlas, heads, model, dataset))
    return target


def read_headvis(folder: str | Path) -> pd.DataFrame:
    """The numbers of each head in such a folder, ours or another's: layer, head, and a column for each metric.

    Raises:
        FormatError: it is no such folder.
    """
    import pandas as pd

    where = Path(folder)
    try:
        raw = {name: (where / name).read_bytes() for name in (CONFIG, NUMBERS)}
    except OSError as error:
        raise FormatError(f"{where.name} is no folder of HeadVis: {error.strerror}") from None
    names = [one.text() for one in parse(raw[CONFIG], CONFIG)["metrics"].list()]
    rows = []
    for row in parse(raw[NUMBERS], NUMBERS).list():
        found: dict[str, Any] = {name: row[name].integer(0) for name in ("layer", "head")}
        for name in names:
            number = row.get(name)
            found[name] = math.nan if number is None else number.number()
        rows.append(found)
    return pd.DataFrame(rows, columns=["layer", "head", *names])


def _config(atlas: CorpusAtlas, heads: Sequence[tuple[int, int]], model: str, dataset: str) -> dict[str, Any]:
    layers, per_layer = len({layer for layer, _ in heads}), 1 + max(head for _, head in heads)
    return {
        "model_name": utf8(model), "dataset_name": utf8(dataset), "heads": heads, "n_layers": layers,
        "n_heads": per_layer, "n_intervals": 1, "metrics": list(MEANINGS), "metric_descriptions": MEANINGS,
        "head_data_pattern": "L{layer}H{head}.json", "has_umap": False, "umap_heads": [],
        "custom_plots": [{"key": "qk_distance_histogram", "label": "Distance"}],
        "custom_tables": [
            {"key": "top_query_tokens", "label": "Query tokens"}, {"key": "top_key_tokens", "label": "Key tokens"},
        ],
        "statistics_display": {"n_samples": {"label": "Windows", "format": "default"}},
        "pipeline_config": {
            "model_name": utf8(model), "dataset_name": utf8(dataset), "n_sequences": len(atlas.windows),
            "seq_len": atlas.length, "dtype": str(atlas.provenance.get("dtype", "unknown")),
            "attn_implementation": str(atlas.provenance.get("attention_backend", "unknown")),
        },
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


def _strongest(atlas: CorpusAtlas, wb: Workbench) -> list[list[dict[str, Any]]]:
    """The windows of each head's examples, with the largest weights of their rows: the model is run on them again."""
    if wb.weights_identity() != atlas.identity.get("model weights"):
        raise WorkbenchError("the atlas is of another model", hint="pass the Workbench of the model it was made of")
    wanted: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)  # heads and their examples, by window
    for head, example in (atlas.weights >= 0).nonzero().tolist():
        wanted[tuple(atlas.example_ids[head, example].tolist())].append((head, example))
    found: list[dict[int, dict[str, Any]]] = [{} for _ in atlas.layers]
    names: list[str] | None = None
    for window, asked in wanted.items():
        ids = torch.tensor([window], device=device_for_inputs(wb.model))
        names = self_attention(wb, ids[0]) if names is None else names
        with torch.no_grad(), wb.capture((), names, limit=None) as cap:
            wb.model(input_ids=ids, **without_cache(wb.model))
        tokens = [utf8(str(i) if wb.tokenizer is None else piece(wb.tokenizer, i)) for i in window]
        for head, example in asked:
            weights = cap[atlas.sites[head]].pattern.dense(heads=[atlas.numbers[head]])[0, 0].float().cpu()
            found[head][example] = _sparse(weights, tokens, int(atlas.places[head, example, 0]))
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


def _known(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def _write(path: Path, said: Any) -> None:
    disk.write(path, json.dumps(said, ensure_ascii=True, allow_nan=False) + "\n")
