"""Circuit graph: heads and MLPs by layer and the edges between them, to threshold, to walk along, and to name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from workbench.analysis.circuits.circuit import Circuit
from workbench.counting import count
from workbench.errors import ReportError, expect
from workbench.tokens import visible
from workbench.views.base import scales
from workbench.views.base.registry import register
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View
from workbench.views.circuit_graph import facts as circuit_facts
from workbench.views.circuit_graph.picture import MOST_LINES, WIDTH, Line, Mark, draw, height_of
from workbench.views.figure import columns_of_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from workbench.analysis.circuits.faithfulness_curve import FaithfulnessCurve
    from workbench.analysis.circuits.model.graph import Graph
    from workbench.analysis.circuits.roles import HeadRoles

MOST_EDGES = 5000
_LONGEST_NAME = 60


class PinnedView(View):
    """A view of a graph whose nodes can be pinned and named, in Python and in the browser."""

    graph: Graph
    colours = 256

    @property
    def pins(self) -> dict[str, str]:
        """The pinned nodes and what they are called, "" for nothing; `circuit_graph(…, names=view.pins)` pins again."""
        return dict(self.spec.state.get("pins", {}))

    def pin(self, node: Any, name: str = "") -> Self:
        """Pin a node, given as "a9.h6", "L9H6" or (9, 6), and call it so; returns the view.

        Raises:
            InterventionError: the model has no such node.
        """
        return self.set_state(pins={**self.pins, **pins_of(self.graph, {node: name})})

    def unpin(self, node: Any) -> Self:
        """Take a node's pin and name away; returns the view."""
        (known,) = pins_of(self.graph, {node: ""})
        return self.set_state(pins={name: said for name, said in self.pins.items() if name != known})

    def _is_chosen(self, node: Mapping[str, Any]) -> bool:
        if node["head"] is None:
            return False
        layer, head = node["head"]
        return self.chosen.has(layer, head, node["site"])

    def _put_state(self, state: Mapping[str, Any]) -> None:
        unknown = set(state.get("pins", {})) - set(self.graph.nodes)
        if unknown:
            raise ReportError(f"the graph has no node {sorted(unknown)[0]!r} to pin")
        super()._put_state(state)


class CircuitGraph(PinnedView):
    """See `circuit_graph`."""

    size = (WIDTH, 5.0)

    def __init__(self, spec: ViewSpec, selection: SharedSelection | None, circuit: Circuit) -> None:
        super().__init__(spec, selection)
        self.circuit, self.graph = circuit, circuit.graph

    @property
    def shown(self) -> Circuit:
        """The circuit at the threshold that is set now."""
        state = self.spec.state
        if state.get("by", "found") == "found" or "n" not in state:
            return self.circuit
        return self.circuit.top(min(int(state["n"]), self.spec.facts["ranked"]), absolute=state["by"] == "absolute")

    def picture(self, figure: Figure) -> None:
        import matplotlib as mpl

        facts, shown, graph = self.spec.facts, self.shown, self.graph
        nodes, index = facts["nodes"], {node["name"]: i for i, node in enumerate(facts["nodes"])}
        figure.set_size_inches(WIDTH, height_of(facts["rows"]))
        panel = figure.subplots()
        scores = self.spec.blocks["node_scores"][0]
        inner = [s for s, node in zip(scores, nodes, strict=True) if node["kind"] != "input"]
        low, high = scales.limits(inner, signed=facts["signed"])
        scale = scales.diverging() if facts["signed"] else scales.sequential()
        inside = shown.edges_in
        if shown.level == "node" and shown is not self.circuit:
            readers = np.isin([receiver["node"] for receiver in facts["receivers"]], self._ends(shown))
            inside = ~shown.edge_scores.isnan() & shown.senders_in[:, None] & torch.from_numpy(readers)
        pairs = inside.nonzero().tolist()
        weights = np.abs([float(shown.edge_scores[s, r].nan_to_num(0.0)) for s, r in pairs])
        largest = float(weights.max(initial=0.0)) or 1.0
        ends = {
            "raise": mpl.colors.to_hex(scales.diverging()(0.85)),
            "lower": mpl.colors.to_hex(scales.diverging()(0.15)),
        }
        lines = []
        for (s, r), weight in zip(pairs, weights, strict=True):
            below = float(shown.edge_scores[s, r]) < 0
            colour, dash = (ends["lower"], "dashed") if below else (ends["raise"], "solid")
            lines.append(Line(index[graph.senders[s]], facts["receivers"][r]["node"], weight / largest, colour, dash))
        marks = {}
        for name in {*shown.nodes, *(nodes[i]["name"] for line in lines for i in (line.start, line.end))}:
            i = index[name]
            at = float("nan") if np.isnan(scores[i]) else (scores[i] - low) / (high - low)
            colour = "" if np.isnan(at) else mpl.colors.to_hex(scale(float(np.clip(at, 0, 1))))
            shape, said = "o" if nodes[i]["kind"] == "head" else "s", self.pins.get(name) or nodes[i]["role"]
            marks[i] = Mark(colour, shape, said, self._is_chosen(nodes[i]))
        draw(panel, nodes, facts["rows"], marks, lines)
        cut = f" ({MOST_LINES} drawn)" if len(lines) > MOST_LINES else ""
        what = f"{count(len(shown.nodes), 'node')}, {count(len(lines), 'edge')}{cut}"
        panel.set_title(f"{what}; solid: positive, dashed: negative", fontsize=8)
        bar = figure.colorbar(mpl.cm.ScalarMappable(mpl.colors.Normalize(low, high), scale), ax=panel, shrink=0.5)
        bar.set_label(facts["meaning"], fontsize=7)

    def _ends(self, shown: Circuit) -> list[int]:
        """Nodes that receive in a circuit of nodes: those chosen, what feeds them, and the logits."""
        chosen = {i for i, node in enumerate(self.spec.facts["nodes"]) if node["name"] in set(shown.nodes)}
        more = [
            i for i, node in enumerate(self.spec.facts["nodes"])
            if node["kind"] == "logits" or chosen.intersection(node["feeds"])
        ]  # fmt: skip
        return [*chosen, *more]


def circuit_graph(
    circuit: Circuit,
    *,
    curve: FaithfulnessCurve | None = None,
    names: Mapping[Any, str] | None = None,
    roles: HeadRoles | None = None,
    most: int = MOST_EDGES,
    selection: SharedSelection | None = None,
) -> CircuitGraph:
    """The nodes of a circuit by layer, from the input at the bottom to the logits on top, and its edges.

    A slider chooses the strongest edges (or nodes, where nodes were scored) as `Circuit.top` does, below and above the
    circuit's own size. A node that is pointed at shows what goes in and out of it; arrow keys walk along the strongest
    edge; nodes can be pinned and named, and `view.pins` has the names.

    Args:
        circuit: of edges or of nodes; one of nodes has lines where path patching scored them.
        curve: its faithfulness by size, to say what is kept at each.
        names: of nodes to pin, by "a9.h6", "L9H6" or (9, 6).
        roles: suggested roles of heads, shown where a node has no name.
        most: edges that the page holds; the strongest are.

    Raises:
        InterventionError: the circuit is empty; a name for a node that the model has not.
        ReportError: the curve is of another circuit.
    """
    expect(Circuit, circuit=circuit)
    circuit.check_not_empty()
    if curve is not None and (curve.task, curve.circuit) != (circuit.task, repr(circuit)):
        raise ReportError(f"the curve is of {curve.circuit}, the graph of {circuit!r}", hint="make it for this circuit")
    graph = circuit.graph
    facts, blocks = circuit_facts.skeleton(graph, _roles_of(graph, roles))
    held = circuit_facts.Held(circuit, most)
    blocks |= held.blocks(circuit, {name: i for i, name in enumerate(graph.nodes)})
    blocks |= circuit_facts.node_blocks(graph, [circuit.node_scores], [set(circuit.nodes)])
    ranked, scored = held.ranked, held.scored
    blocks |= {"rank": np.arange(ranked, dtype=np.uint32), "signed_rank": held.signed}
    if circuit.level == "node":
        ranked = scored = int((~circuit.node_scores.isnan()).sum())
        places = np.array([graph.nodes.index(name) for name in graph.senders], np.uint32)
        for name, absolute in (("rank", True), ("signed_rank", False)):
            order = circuit_facts.ranking(circuit.node_scores, absolute=absolute)[:scored]
            blocks[name] = places[order.numpy()]
    labels, columns = circuit_facts.position_facts(circuit, graph.nodes)
    for node, column in zip(facts["nodes"], columns, strict=True):
        node["position"] = column
    signed = bool((circuit.node_scores < 0).any())
    total = circuit.n_edges
    size = total if circuit.level == "edge" else len(circuit.nodes)
    table = circuit.table
    facts |= {
        "level": circuit.level, "unit": "edges" if circuit.level == "edge" else "nodes",
        "circuits": [visible(circuit.task or "circuit")], "totals": [size],
        "positions": labels, "ranked": ranked, "scored": scored, "found": circuit_facts.found_as(circuit),
        "curve": None if curve is None else circuit_facts.curve_facts(curve),
        "meaning": circuit_facts.NODE_SCORE[circuit.level], "signed": signed,
    }  # fmt: skip
    what = count(len(circuit.nodes), "node") + (f" and {count(total, 'edge')}" if total else "")
    kept = "" if curve is None else f" {_kept(circuit, curve)}"
    spec = ViewSpec(
        kind="circuit_graph",
        title=f"Circuit of {circuit.task}",
        caption=f"{what}, by {circuit.method} on {circuit.metric}.{kept}",
        facts=facts,
        blocks=blocks,
        table=columns_of_table(table.head(most)),
        notes=_notes(circuit, held, len(table), most, roles),
        state={"pins": pins_of(graph, names or {})},
        provenance=circuit.provenance,
    )
    return CircuitGraph(spec, selection, circuit)


def pins_of(graph: Graph, names: Mapping[Any, str]) -> dict[str, str]:
    """Names by node, as they are shown: every character to be seen, and not too many.

    Raises:
        InterventionError: the model has no such node.
    """
    nodes = set(graph.nodes)
    return {
        str(node) if node in nodes else graph.head_name(node): visible(said, _LONGEST_NAME) if said else ""
        for node, said in names.items()
    }


def _roles_of(graph: Graph, roles: HeadRoles | None) -> dict[str, str]:
    if roles is None:
        return {}
    pairs = zip(roles.heads, roles.roles, strict=True)
    return {graph.head_name(head): ", ".join(visible(role) for role in several) for head, several in pairs if several}


def _kept(circuit: Circuit, curve: FaithfulnessCurve) -> str:
    size = circuit.n_edges if curve.level == "edge" else len(circuit.nodes)
    if not curve.denominator.defined:
        return f"What circuits keep is undefined as a share: {curve.denominator}."
    nearest = int(np.abs(np.array(curve.kept_absolute) - size).argmin())
    share = curve.absolute[nearest]
    measured = curve.kept_absolute[nearest]
    return f"The nearest measured size, {measured:,}, keeps {share:.0%} of the effect ({curve.ablation} ablation)."


def _notes(
    circuit: Circuit, held: circuit_facts.Held, rows: int, most: int, roles: HeadRoles | None
) -> tuple[str, ...]:
    said = [f"Sign of the scores: {circuit.sign}.", f"Direction: {circuit.direction}."]
    if held.own < circuit.n_edges:
        said.append(f"The {held.own:,} strongest edges are drawn, of {circuit.n_edges:,}.")
    if held.ranked < held.scored:
        said.append(f"The page holds the {held.ranked:,} strongest of {held.scored:,} scored edges; most= holds more.")
    if rows > most:
        said.append(f"The table holds the first {most:,} of {rows:,} rows; circuit.table has all.")
    if roles is not None:
        said.append(f"Roles are suggested from attention, from {roles.threshold:g} on, and are no more than that.")
    return tuple(said)


register(Circuit, circuit_graph)
