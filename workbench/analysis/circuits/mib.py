"""MIB's JSON of a circuit: `{cfg, nodes: {name: {in_graph, score}}, edges: {name: {score, in_graph}}}`.

MIB's own reader wants an edge for each query head and a score for every edge. Where heads share keys and values, this
package has one edge per group: it is written as one edge for each of its heads, all in the graph or none, with equal
shares of the group's score, and read as their sum, which is what linear scores add up to. Edges that were not scored
get the score 0, as in MIB's own graphs, and `"scored": false`, which MIB does not read and this package does.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.nodes import Layer
from workbench.errors import FormatError, WorkbenchError
from workbench.storage import disk
from workbench.storage.parts import Part, parse

_KV = re.compile(r"(a\d+\.h\d+)<([kv])>")
_GROUP = re.compile(r"a(\d+)\.kv(\d+)<([kv])>")
_MOST = 10_000  # layers, heads
_FEW = 2_000  # nodes of graphs that are made whatever the file tells of them


@dataclass(frozen=True)
class Read:
    """What a file says."""

    graph: Graph
    senders_in: Tensor
    edges_in: Tensor
    node_scores: Tensor
    edge_scores: Tensor


def write(
    path: str | Path, graph: Graph, senders_in: Tensor, edges_in: Tensor, node_scores: Tensor, edge_scores: Tensor,
    grouped: bool = False,
) -> Path:  # fmt: skip
    """Write a circuit. Nodes without a score are written without one.

    Args:
        grouped: write the edges of a kv group as they are here, `a0.h1->a9.kv2<k>`, which MIB's own code cannot read.

    Raises:
        FileError: the file cannot be written. WorkbenchError: heads or parallel blocks differ between layers, which the
            form cannot say.
    """
    target = disk.writable(path)
    first = graph.layers[0]
    if any(layer != first for layer in graph.layers) or not first.mlp or first.mixer:
        raise WorkbenchError(
            "MIB's form has the same heads, with queries, keys and values, and an MLP in every layer; this model's "
            "layers differ"
        )
    cfg: dict[str, Any] = {
        "n_layers": len(graph.layers), "n_heads": first.n_heads, "parallel_attn_mlp": first.parallel,
        "d_model": graph.d_model,
    }  # fmt: skip
    if first.n_kv_heads != first.n_heads:
        cfg["n_key_value_heads"] = first.n_kv_heads
    inside = set(graph.nodes_of(edges_in)) | {graph.senders[i] for i in senders_in.nonzero()[:, 0].tolist()}
    nodes: dict[str, Any] = {}
    for name in graph.nodes:
        if ".kv" in name and not grouped:
            continue  # MIB has no such node
        nodes[name] = {"in_graph": name in inside or name == "logits"}
        if name in graph.sender_index:
            score = float(node_scores[graph.sender_index[name]])
            nodes[name] |= {} if math.isnan(score) else {"score": score}
    edges: dict[str, Any] = {}
    for s, r in graph.exists.nonzero().tolist():
        score = float(edge_scores[s, r])
        facts = {"in_graph": bool(edges_in[s, r])} | ({"scored": False} if math.isnan(score) else {})
        names = [graph.receivers[r]] if grouped else _of_heads(graph, graph.receivers[r])
        for name, share in zip(names, _shares(0.0 if math.isnan(score) else score, len(names)), strict=True):
            edges[f"{graph.senders[s]}->{name}"] = {"score": share, **facts}
    return disk.write(target, json.dumps({"cfg": cfg, "nodes": nodes, "edges": edges}))


def read(path: str | Path, graph: Graph | None = None) -> Read:
    """Read a circuit.

    Raises:
        FormatError: it is no such JSON, or of another model than `graph`.
    """
    path = disk.readable(path)
    try:
        raw = disk.content(path)
    except (OSError, ValueError) as error:  # a name with characters that no path may have is a ValueError
        raise FormatError(f"{path.name!r} cannot be read: {getattr(error, 'strerror', error)}") from None
    try:
        data = parse(raw, path.name)
        nodes, edges = data["nodes"].items(), data["edges"].items()
        own = _graph(data["cfg"], len(nodes) + len(edges))
    except FormatError as error:
        raise FormatError(f"{path.name} is no circuit in MIB's form: {error.message}") from None
    if graph is None:
        graph = own
    elif (len(own.layers), own.layers[0].n_heads, own.d_model) != (
        len(graph.layers), graph.layers[0].n_heads, graph.d_model,
    ):  # fmt: skip
        raise FormatError(
            f"{path.name} is of another model: {len(own.layers)} layers of {own.layers[0].n_heads} heads, width "
            f"{own.d_model}; this one has {len(graph.layers)} of {graph.layers[0].n_heads}, width {graph.d_model}"
        )
    shape = (len(graph.senders), len(graph.receivers))
    edge_scores, edges_in = torch.full(shape, torch.nan, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    node_scores, senders_in = (
        torch.full(shape[:1], torch.nan, dtype=torch.float64),
        torch.zeros(shape[0], dtype=torch.bool),
    )
    for name, facts in edges.items():
        s, r = graph.edge(_to_group(name, graph))
        score = _score(facts)
        if score is not None and _flag(facts, "scored", default=True):
            edge_scores[s, r] = score if bool(edge_scores[s, r].isnan()) else edge_scores[s, r] + score
        edges_in[s, r] |= _flag(facts, "in_graph")
    for name, facts in nodes.items():
        if name not in graph.nodes:
            raise FormatError(f"{path.name} has the node {name!r}, which the model has not")
        if name in graph.sender_index:
            score = _score(facts)
            i = graph.sender_index[name]
            node_scores[i] = torch.nan if score is None else score
            senders_in[i] = _flag(facts, "in_graph")
    return Read(graph, senders_in, edges_in, node_scores, edge_scores)


def _graph(cfg: Part, n_told: int) -> Graph:
    """The graph of a configuration, if a file that tells of so many nodes and edges can be one of it."""
    n_layers, heads = cfg["n_layers"].integer(1, _MOST), cfg["n_heads"].integer(1, _MOST)
    given, parallel = cfg.get("n_key_value_heads"), cfg.get("parallel_attn_mlp")
    groups = heads if given is None else given.integer(1, heads)
    if heads % groups:
        raise FormatError(f"{cfg.place} has {heads} heads, no multiple of its {groups} key and value heads")
    # A file tells of every edge, of which there are more than half the square of the nodes: no graph is made that takes
    # much more memory than its file.
    n_nodes = n_layers * (heads + 1)
    if n_nodes > _FEW and n_nodes**2 > 4 * n_told:
        raise FormatError(
            f"{cfg.place} is of {n_layers:,} layers of {heads:,} heads, the file tells of {n_told:,} parts"
        )
    layer = Layer(heads, groups, True, parallel is not None and parallel.flag())
    return Graph((layer,) * n_layers, cfg["d_model"].integer(1, _MOST**2))


def _of_heads(graph: Graph, receiver: str) -> list[str]:
    """The receiver as MIB has it: k or v of a group for each of its heads."""
    found = _GROUP.fullmatch(receiver)
    if found is None:
        return [receiver]
    layer = graph.layers[int(found[1])]
    size = layer.n_heads // layer.n_kv_heads
    return [f"a{found[1]}.h{int(found[2]) * size + i}<{found[3]}>" for i in range(size)]


def _shares(score: float, n: int) -> list[float]:
    """`n` equal parts, the last of which makes their sum in this order exact."""
    parts = [score / n] * (n - 1)
    return [*parts, score - sum(parts)]


def _to_group(name: str, graph: Graph) -> str:
    source, arrow, target = name.partition("->")
    found = _KV.fullmatch(target)
    if found is None or found[1] not in graph.sender_index:
        return name
    return source + arrow + graph.receiver(found[1], found[2])


def _score(facts: Part) -> float | None:
    score = facts.get("score")
    return None if score is None else score.number()


def _flag(facts: Part, key: str, *, default: bool = False) -> bool:
    flag = facts.get(key)
    return default if flag is None else flag.flag()
