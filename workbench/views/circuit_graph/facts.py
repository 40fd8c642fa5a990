"""What a circuit graph holds: nodes, the strongest edges, the orders to choose them in, and the measured curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.names import head_of, site_of
from workbench.tokens import visible
from workbench.views.circuit_graph.places import node_of, part_of, places_of, rows_of

if TYPE_CHECKING:
    from workbench.analysis.circuits.faithfulness_curve import FaithfulnessCurve

NODE_SCORE = {
    "edge": "score: sum of |score| over a node's outgoing edges",
    "node": "score of the node",
}


def skeleton(graph: Graph, roles: Mapping[str, str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts and blocks that all circuits of a graph share: nodes, receivers, and which senders compute with what.

    Args:
        roles: by name of the node; shown beside it.
    """
    places = places_of(graph)
    index = {place.name: i for i, place in enumerate(places)}
    nodes = []
    for place in places:
        head = head_of(place.name)
        nodes.append({
            "name": place.name, "label": place.label, "short": place.short, "kind": place.kind, "layer": place.layer,
            "number": place.number, "raised": place.raised, "feeds": [index[name] for name in place.feeds],
            "head": None if head is None else list(head), "site": site_of(place.label),
            "role": (roles or {}).get(place.name, ""),
        })  # fmt: skip
    receivers = [{"node": index[node_of(name)], "part": part_of(name)} for name in graph.receivers]
    senders = np.array([index[name] for name in graph.senders])
    pairs = graph.feeds.nonzero().numpy()  # [pair, (sender, receiver)]
    feeds = np.stack([pairs[:, 1], senders[pairs[:, 0]]], axis=1) if len(pairs) else np.zeros((0, 2))
    facts = {"nodes": nodes, "rows": rows_of(graph), "receivers": receivers}
    return facts, {"feeds": feeds.astype(np.uint32)}


class Held:
    """The edges that a page holds of one circuit: the strongest that are scored, and the circuit's own.

    Attributes:
        flat: indices into the flattened [sender, receiver], the scored ones by magnitude first.
        ranked: how many of these are the strongest of all, in order. scored: how many have a score at all.
        signed: places in `flat` by signed score, as far as that order is known from what is held.
        own: how many edges of the circuit are held.
    """

    def __init__(self, circuit: Circuit, most: int) -> None:
        scores = circuit.edge_scores.flatten()
        self.scored = int((~scores.isnan()).sum())
        self.ranked = min(most, self.scored)
        order = ranking(scores, absolute=True)
        first = order[: self.ranked]
        inside = circuit.edges_in.flatten()
        own = order[inside[order]][:most]
        self.own = len(own)
        self.flat = torch.cat([first, own[~torch.isin(own, first)]])
        self.signed = known_prefix(ranking(scores, absolute=False)[: self.scored], first)

    def blocks(self, circuit: Circuit, node_index: Mapping[str, int]) -> dict[str, Any]:
        """Ends, score and membership of the edges, and their order by signed score."""
        graph = circuit.graph
        senders = np.array([node_index[name] for name in graph.senders], np.uint32)
        n = len(graph.receivers)
        return {
            "senders": senders[(self.flat // n).numpy()],
            "receivers": (self.flat % n).numpy().astype(np.uint32),
            "scores": circuit.edge_scores.flatten()[self.flat].numpy().astype(np.float64)[None],
            "members": circuit.edges_in.flatten()[self.flat].numpy().astype(np.uint8)[None],
        }


def ranking(scores: Tensor, *, absolute: bool) -> Tensor:
    """Indices of [item] scores, highest first, ties in the order of the model: as `Circuit.top` chooses."""
    weights = scores.abs() if absolute else scores
    return weights.nan_to_num(-torch.inf).argsort(descending=True, stable=True)


def known_prefix(order: Tensor, held: Tensor) -> np.ndarray[Any, Any]:
    """The beginning of an order up to the first item that is not held, as places in `held`."""
    place = {int(item): i for i, item in enumerate(held.tolist())}
    found = []
    for item in order.tolist():
        if item not in place:
            break
        found.append(place[item])
    return np.array(found, np.uint32)


def node_blocks(graph: Graph, scores: Sequence[Tensor | None], members: Sequence[set[str]]) -> dict[str, Any]:
    """[circuit, node] score, NaN where it has none, and membership; in the order of `Graph.nodes`."""
    held = np.full((len(members), len(graph.nodes)), np.nan)
    index = {name: i for i, name in enumerate(graph.nodes)}
    for row, values in zip(held, scores, strict=True):
        for name, value in zip(graph.senders, [] if values is None else values.tolist(), strict=values is not None):
            row[index[name]] = value
    inside = np.array([[name in chosen for name in graph.nodes] for chosen in members], np.uint8)
    return {"node_scores": held, "node_members": inside}


def found_as(circuit: Circuit) -> dict[str, Any]:
    """Which choice the circuit is: the n highest by magnitude or signed score; n is None where it is neither."""
    wanted, absolute = circuit.threshold.get("value"), circuit.threshold.get("absolute", True)
    scores = circuit.edge_scores if circuit.level == "edge" else circuit.node_scores
    if isinstance(wanted, int) and 0 < wanted <= int((~scores.isnan()).sum()):
        same = circuit.top(wanted, absolute=absolute)
        inside = "edges_in" if circuit.level == "edge" else "senders_in"
        if bool((getattr(same, inside) == getattr(circuit, inside)).all()):
            return {"n": wanted, "by": "absolute" if absolute else "signed"}
    return {"n": None, "by": None}


def curve_facts(curve: FaithfulnessCurve) -> dict[str, Any]:
    """Measured shares of the effect by how many were chosen, by magnitude and by signed score."""

    def one(shares: list[float], intervals: list[tuple[float, float]]) -> dict[str, Any]:
        at = {size: i for i, size in enumerate(curve.sizes) if size > 0}  # equal sizes are the same choice
        return {
            "sizes": list(at),
            "shares": [shares[i] for i in at.values()] if curve.denominator.defined else [],
            "low": [intervals[i][0] for i in at.values()],
            "high": [intervals[i][1] for i in at.values()],
        }

    return {
        "undefined": "" if curve.denominator.defined else visible(str(curve.denominator)),
        "ablation": visible(curve.ablation),
        "metric": visible(curve.metric),
        "absolute": one(curve.absolute, curve.intervals(0)),
        "signed": one(curve.signed, curve.intervals(1)),
    }


def position_facts(circuit: Circuit, nodes: Sequence[str]) -> tuple[list[str], list[int | None]]:
    """Columns of path patching: the positions of the stages, and which one each node stands in.

    A head stands where the stage patches in which its importance is largest, and what receives in a stage with it.
    """
    if not circuit.stages:
        return [], [None] * len(nodes)
    said = [_positions(stage["positions"]) for stage in circuit.stages]
    labels = list(dict.fromkeys(reversed(said)))  # from the last stage, which is the earliest in the model
    importances = torch.stack([stage["importance"] for stage in circuit.stages])
    known = ~importances.isnan().all(0)
    largest = importances.abs().nan_to_num(-1.0).argmax(0)
    column: dict[str, int] = {}
    for stage, text in zip(circuit.stages, said, strict=True):
        for receiver in stage["receivers"]:
            column.setdefault(node_of(receiver), labels.index(text))
    for i, name in enumerate(circuit.graph.senders):
        if bool(known[i]):
            column[name] = labels.index(said[int(largest[i])])
    return labels, [column.get(name) for name in nodes]


def _positions(where: Any) -> str:
    if where is None:
        return "all positions"
    several = where if isinstance(where, (tuple, list)) else (where,)
    return ", ".join(visible(str(each)) for each in several)
