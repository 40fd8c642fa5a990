"""What results say of each head: numbers, the rows that stand out, and the circuits that it is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.model.names import label
from workbench.analysis.circuits.roles import HeadRoles
from workbench.analysis.importance import HeadImportance
from workbench.analysis.logits import LogitAttribution
from workbench.analysis.profile.measuring import labels_of
from workbench.capture.capture import Capture
from workbench.errors import ReportError, WorkbenchError
from workbench.hooks.sites import Site
from workbench.views.base.spec import Array
from workbench.views.head_atlas.numbers import of_capture

EDGES = 8
"""Edges of a circuit into a head, and out of it, that are listed."""
_CANDIDATES = 4  # largest weights of a row, of which one beyond the first key is looked for


@dataclass(frozen=True)
class Number:
    """One number per head: values, and where known intervals, in the order of the heads; NaN is not known."""

    group: str
    name: str
    values: Array
    low: Array | None = None
    high: Array | None = None


@dataclass(frozen=True)
class Rows:
    """Of each head the rows with the largest weight on a key other than the first.

    Attributes:
        prompt, query, key: [head, row], −1 where there is none. weight: [head, row], NaN likewise.
        texts: tokens of each prompt, None where they are not known.
    """

    prompt: Array
    query: Array
    key: Array
    weight: Array
    texts: list[list[str] | None]


def heads_of(capture: Capture) -> tuple[list[tuple[Site, int]], tuple[str, ...]]:
    """All heads of a capture, and their labels."""
    first = capture.calls[0]
    found = [(each.site, head) for each in first for head in (each.site.here or range(each.shape[1]))]
    return found, labels_of(found)


def numbers_of(
    capture: Capture,
    heads: Sequence[tuple[Site, int]],
    labels: Sequence[str],
    roles: HeadRoles | None,
    importance: HeadImportance | None,
    attribution: LogitAttribution | None,
) -> list[Number]:
    """Everything that there is a number per head of, group by group."""
    found: list[Number] = []
    if roles is not None:
        found += [
            Number("role evidence", name.replace("_", " "), _by_label(labels, roles.heads, values))
            for name, values in roles.evidence.items()
        ]
    if importance is not None:
        for method, measure in importance.scores:
            ends = importance.interval(method, measure)
            where = importance.heads
            three = (importance.score(method, measure), ends[:, 0], ends[:, 1])
            values, low, high = (_by_label(labels, where, each) for each in three)
            found.append(Number("importance", f"{method.replace('_', ' ')}, {measure}", values, low, high))
    if attribution is not None:
        ends = attribution.interval
        at = {
            (attribution.layers[i], attribution.numbers[i]): i for i, k in enumerate(attribution.kinds) if k == "head"
        }
        rows = [at.get((site.layer, head), -1) for site, head in heads]
        three = (attribution.values.double().mean(1), ends[:, 0], ends[:, 1])
        values, low, high = (np.array([float(each[row]) if row >= 0 else np.nan for row in rows]) for each in three)
        found.append(Number("what it writes", f"share in the {attribution.asked}", values, low, high))
    sites, metrics, means, *_ = of_capture(capture)
    place = {(site.name, head): i for i, (site, head) in enumerate(_every(sites))}
    at_heads = [place[site.name, head] for site, head in heads]
    found += [
        Number("statistics", metric.label, np.asarray(row)[at_heads])
        for metric, row in zip(metrics.values(), means, strict=True)
    ]
    return found


def _every(sites: Sequence[Site]) -> list[tuple[Site, int]]:
    return [(site, head) for site in sites for head in range(site.n_heads or 0)]


def _by_label(labels: Sequence[str], known: Sequence[str], values: Any) -> Array:
    at = {name: i for i, name in enumerate(known)}
    return np.array([float(values[at[name]]) if name in at else np.nan for name in labels])


def rows_of(capture: Capture, heads: Sequence[tuple[Site, int]], n: int) -> Rows | None:
    """The rows that stand out, over all forwards and batch entries; None where no pattern was kept.

    The first key is left out, since most heads rest on it: a row counts with its largest weight on another one.
    """
    best: list[list[tuple[float, int, int, int]]] = [[] for _ in heads]
    texts: list[list[str] | None] = []
    place = {(site.name, head): i for i, (site, head) in enumerate(heads)}
    for call in capture.calls:
        first, known = len(texts), False
        for each in call:
            try:
                pattern = each.pattern
            except WorkbenchError:
                continue
            if not known:
                tokens = call.query_tokens(each.site.name)
                texts += [None] * each.shape[0] if tokens is None else [list(row) for row in tokens]
                known = True
            pattern = pattern.magnitude() if pattern.by_magnitude else pattern
            found = pattern.statistics(["top_keys"], n_top=min(_CANDIDATES, each.shape[3]))
            keys, weights = found["top_keys_index"].cpu(), found["top_keys_weight"].float().cpu()
            leading = weights.masked_fill((keys <= 0) | ~weights.isfinite(), -1.0)
            weight, which = leading.max(-1)  # [batch, head, query]
            key = keys.gather(-1, which[..., None])[..., 0]
            top, at = weight.topk(min(n, weight.shape[-1]), dim=-1)
            for b in range(each.shape[0]):
                for head in each.site.here or range(each.shape[1]):
                    pairs = zip(top[b, head].tolist(), at[b, head].tolist(), strict=True)
                    best[place[each.site.name, head]] += [
                        (w, first + b, q, int(key[b, head, q])) for w, q in pairs if w > 0
                    ]
    if not texts:
        return None
    prompts, queries, at_keys = (np.full((len(heads), n), -1, np.int32) for _ in range(3))
    shown = np.full((len(heads), n), np.nan, np.float32)
    for i, rows in enumerate(best):
        for j, (strength, prompt, at_query, at_key) in enumerate(sorted(rows, key=lambda row: -row[0])[:n]):
            prompts[i, j], queries[i, j], at_keys[i, j], shown[i, j] = prompt, at_query, at_key, strength
    return Rows(prompts, queries, at_keys, shown, texts)


def circuit_facts(name: str, circuit: Circuit, labels: Sequence[str]) -> dict[str, Any]:
    """Which heads a circuit has, with their strongest edges in and out."""
    graph = circuit.graph
    inside = set(circuit.heads)
    known = {label(each) for each in graph.senders}
    unknown = [each for each in labels if each not in known]
    if unknown:
        raise ReportError(f"the circuit {name!r} is of another model: it has no head {unknown[0]}")
    of: dict[str, dict[str, Any]] = {}
    reads: dict[str, list[tuple[str, str, float]]] = {}
    writes: dict[str, list[tuple[str, str, float]]] = {}
    for s, r in circuit.edges_in.nonzero().tolist():
        score = float(circuit.edge_scores[s, r])
        sender, receiver = graph.senders[s], graph.receivers[r]
        spot = graph.receiver_spot(receiver)
        target = receiver.partition("<")[0]
        writes.setdefault(label(sender), []).append((label(target), spot.part, score))
        for owner in _owners(graph, spot, target):
            reads.setdefault(label(owner), []).append((label(sender), spot.part, score))
    for head in labels:
        if head in inside:
            node = circuit.score_of(head)
            of[head] = {
                "score": None if np.isnan(node) else node,
                "reads": _strongest(reads.get(head, [])),
                "writes": _strongest(writes.get(head, [])),
                "n_reads": len(reads.get(head, [])),
                "n_writes": len(writes.get(head, [])),
            }
    return {"name": name, "about": f"{circuit.method.replace('_', ' ')}, {circuit.metric}", "heads": of}


def _owners(graph: Any, spot: Any, target: str) -> list[str]:
    """The heads whose part a receiver is: all of a group share its keys and values, all of a mixer what it reads."""
    if spot.what not in ("group", "mixer"):
        return [target]
    layer = graph.layers[spot.layer]
    size = layer.n_heads if spot.what == "mixer" else layer.n_heads // layer.n_kv_heads
    return [f"{graph.attention(spot.layer)}.h{spot.number * size + i}" for i in range(size)]


def _strongest(edges: Sequence[tuple[str, str, float]]) -> list[list[Any]]:
    ranked = sorted(edges, key=lambda edge: -abs(edge[2]) if edge[2] == edge[2] else 0.0)
    return [[name, part, None if score != score else score] for name, part, score in ranked[:EDGES]]


def named_circuits(circuits: Any) -> Mapping[str, Circuit]:
    """Circuits by name: one alone and those of a list have the names of their tasks."""
    if isinstance(circuits, Mapping):
        return circuits
    several = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    names = [each.task for each in several]
    return {
        name if names.count(name) == 1 else f"{name} {i + 1}": each
        for i, (name, each) in enumerate(zip(names, several, strict=True))
    }
