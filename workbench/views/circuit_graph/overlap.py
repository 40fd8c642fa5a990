"""Overlap graph: what two circuits share and what only one has, drawn as one circuit graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.overlap_result import CircuitOverlap
from workbench.errors import ReportError
from workbench.tokens import visible
from workbench.views.base.drawing import SERIES
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.circuit_graph import facts as circuit_facts
from workbench.views.circuit_graph.picture import WIDTH, Line, Mark, draw, height_of
from workbench.views.circuit_graph.places import node_of
from workbench.views.circuit_graph.view import PinnedView, pins_of
from workbench.views.figure import columns_of_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_EDGES = 20_000
WARNING = "Overlap alone does not say that shared parts do the same."
_SHAPES = {"shared": "o", "a": "s", "b": "D"}
_DASHES = {"shared": "solid", "a": "dashed", "b": "dotted"}


class OverlapGraph(PinnedView):
    """See `overlap_graph`."""

    size = (WIDTH, 5.0)

    def __init__(self, spec: ViewSpec, selection: SharedSelection | None, graph: Graph) -> None:
        super().__init__(spec, selection)
        self.graph = graph

    def _pair(self) -> tuple[int, int]:
        """Which circuits are compared now."""
        first, second = self.spec.state.get("pair", (0, 1))
        return int(first), int(second)

    def picture(self, figure: Figure) -> None:
        figure.set_size_inches(WIDTH, height_of(self.spec.facts["rows"]))
        self._draw_pair(figure.subplots())

    def _draw_pair(self, panel: Any) -> None:
        facts, blocks, pair = self.spec.facts, self.spec.blocks, self._pair()
        colours = {"shared": panel.xaxis.get_ticklabels()[0].get_color(), "a": SERIES[0], "b": SERIES[1]}
        labels = [facts["circuits"][i] for i in pair]
        hidden = set(self.spec.state.get("hidden", ()))
        scores = np.nan_to_num(np.abs(blocks["scores"]))
        weights = (scores / np.maximum(scores.max(1, keepdims=True, initial=0.0), 1e-30))[list(pair)].max(0)
        known = bool(scores.any())
        lines, marks = [], {}
        for edge, kind in _kinds(blocks["members"][list(pair)], hidden):
            start, end = int(blocks["senders"][edge]), facts["receivers"][blocks["receivers"][edge]]["node"]
            lines.append(Line(start, end, weights[edge] if known else 0.2, colours[kind], _DASHES[kind]))
        drawn = {i for line in lines for i in (line.start, line.end)}
        for node, kind in _kinds(blocks["node_members"][list(pair)], hidden):
            if facts["unit"] != "edges" or node in drawn:
                about = facts["nodes"][node]
                pinned, chosen = self.pins.get(about["name"], ""), self._is_chosen(about)
                marks[node] = Mark(colours[kind], _SHAPES[kind], pinned, chosen)
        draw(panel, facts["nodes"], facts["rows"], marks, lines)
        said = zip(("shared", f"only {labels[0]}", f"only {labels[1]}"), colours.items(), strict=True)
        for words, (kind, colour) in said:
            panel.plot([], [], _SHAPES[kind], color=colour, linestyle=_DASHES[kind], label=words)
        panel.legend(loc="upper left", fontsize=8, bbox_to_anchor=(0, 1.08), ncols=3)


def _kinds(members: Any, hidden: set[str]) -> list[tuple[int, str]]:
    """Items of [2, item] bool with "shared", "a" or "b", less the hidden kinds."""
    found = []
    for i in np.flatnonzero(members.any(0)).tolist():
        kind = "shared" if members[:, i].all() else "a" if members[0, i] else "b"
        if kind not in hidden:
            found.append((i, kind))
    return found


def overlap_graph(
    overlap: CircuitOverlap,
    a: Circuit | None = None,
    b: Circuit | None = None,
    *,
    names: Mapping[Any, str] | None = None,
    most: int = MOST_EDGES,
    selection: SharedSelection | None = None,
) -> OverlapGraph:
    """What two circuits share, what only the first and what only the second has, in one graph.

    Args:
        overlap: of the two circuits.
        a, b: the circuits themselves, for the scores of edges. Without them edges are drawn alike.
        names: of nodes to pin, as in `circuit_graph`.
        most: edges that the page holds.

    Raises:
        ReportError: the circuits are not those of the overlap, or only one is given.
    """
    items = [{*overlap.shared, *overlap.only_a}, {*overlap.shared, *overlap.only_b}]
    if (a is None) != (b is None):
        raise ReportError("one of the two circuits is missing", hint="pass both, or none")
    circuits = None if a is None or b is None else (a, b)
    if circuits is not None and (repr(circuits[0]), repr(circuits[1])) != (overlap.a, overlap.b):
        raise ReportError(f"the overlap is of {overlap.a} and {overlap.b}, not of these circuits")
    graph = Graph.of(overlap.model)
    labels = unlike([visible(task) for task in overlap.tasks])
    facts, blocks, notes = compared(graph, labels, items, circuits, overlap.unit, most)
    spec = ViewSpec(
        kind="circuit_graph",
        title=f"Overlap of {overlap.tasks[0]} and {overlap.tasks[1]}",
        caption=caption_of(overlap),
        facts=facts,
        blocks=blocks,
        table=columns_of_table(overlap.table),
        notes=(
            *notes,
            WARNING + ("" if overlap.cross_faithfulness else " Cross-faithfulness was not asked for (wb= and tasks=)."),
        ),
        state={"pins": pins_of(graph, names or {})},
        provenance=overlap.provenance,
    )
    return OverlapGraph(spec, selection, graph)


def caption_of(overlap: CircuitOverlap) -> str:
    """How much two circuits share, and what chance would give."""
    low, high = overlap.intervals.get("jaccard", (math.nan, math.nan))
    own = overlap.values["jaccard"]
    interval = f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) and math.isfinite(high) else ""
    return (
        f"{len(overlap.shared)} shared {overlap.unit}; Jaccard {own:.3f}{interval}, "
        f"{overlap.expected:.3f} by chance (p {overlap.p_value:.2g})."
    )


def compared(
    graph: Graph, labels: Sequence[str], items: Sequence[set[str]], circuits: Sequence[Circuit] | None, unit: str,
    most: int,
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:  # fmt: skip
    """Facts, blocks and notes of a graph of several circuits, whose items are edges or nodes."""
    facts, blocks = circuit_facts.skeleton(graph)
    index = {name: i for i, name in enumerate(graph.nodes)}
    edges = [graph.edge(name) for name in sorted(set().union(*items))] if unit == "edges" else []
    edges.sort()
    scores = np.full((len(items), len(edges)), np.nan)
    if circuits is not None and edges:
        s, r = np.array(edges).T
        scores = np.stack([circuit.edge_scores.numpy()[s, r] for circuit in circuits]).astype(np.float64)
    notes: tuple[str, ...] = ()
    if len(edges) > most:
        largest = np.nanmax(np.abs(scores), axis=1, keepdims=True, initial=1e-30)
        strength = (np.nan_to_num(np.abs(scores)) / largest).max(0)
        kept = np.sort(np.argsort(-strength, kind="stable")[:most])
        notes = (f"The page holds {most:,} of the {len(edges):,} edges of these circuits.",)
        edges, scores = [edges[i] for i in kept], scores[:, kept]
    named = [f"{graph.senders[s]}->{graph.receivers[r]}" for s, r in edges]
    if unit == "edges":
        inside = [{node for name in chosen for node in _ends(name)} for chosen in items]
    else:
        inside = [set(chosen) for chosen in items]
    of_nodes = [None] * len(items) if circuits is None else [circuit.node_scores for circuit in circuits]
    blocks |= circuit_facts.node_blocks(graph, of_nodes, inside)
    blocks |= {
        "senders": np.array([index[graph.senders[s]] for s, _ in edges], np.uint32),
        "receivers": np.array([r for _, r in edges], np.uint32),
        "scores": scores,
        "members": np.array([[name in chosen for name in named] for chosen in items], np.uint8).reshape(
            len(items), len(edges)
        ),
        "rank": np.zeros(0, np.uint32),
        "signed_rank": np.zeros(0, np.uint32),
        "shared": np.array([[len(one & other) for other in items] for one in items], np.uint32),
    }
    facts |= {
        "level": "edge" if unit == "edges" else "node", "unit": unit, "circuits": list(labels),
        "totals": [len(chosen) for chosen in items], "positions": [], "ranked": 0, "scored": 0,
        "found": {"n": None, "by": None}, "curve": None, "meaning": "", "signed": False,
    }  # fmt: skip
    return facts, blocks, notes


def _ends(edge: str) -> tuple[str, str]:
    sender, _, receiver = edge.partition("->")
    return sender, node_of(receiver)


def unlike(labels: Sequence[str]) -> list[str]:
    """The labels, with a number behind those that are equal."""
    alike = {label for label in labels if labels.count(label) > 1}
    return [f"{label} ({i})" if label in alike else label for i, label in enumerate(labels, 1)]
