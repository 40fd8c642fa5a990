"""Circuit graph: heads and MLPs by layer, and the edges between them, thicker where they matter more."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.graph import Graph
from workbench.analysis.circuits.names import head_of, label
from workbench.errors import ReportError
from workbench.views.base import View
from workbench.views.figure import figure
from workbench.views.of import of

if TYPE_CHECKING:
    from workbench.analysis.circuits.faithful import FaithfulnessCurve

MOST_EDGES = 600
_CLASSES = ((0.05, 4.0, "strongest 5 %"), (0.25, 2.0, "next 20 %"), (1.0, 0.7, "the rest"))
_COLOURS = {"raise": "#3b7dd8", "lower": "#d1563f"}  # told apart without red and green, on light and dark


def circuit_graph(circuit: Circuit, *, curve: FaithfulnessCurve | None = None, most: int = MOST_EDGES) -> View:
    """The nodes of a circuit by layer, from the input at the bottom to the logits on top, and its edges.

    Edges stand in groups of equal strength, which the legend hides and shows. A node's colour is its score; a click
    chooses its head in the shared selection.

    Args:
        circuit: of edges or of nodes; one of nodes has no lines.
        curve: its faithfulness by size, to say in the caption what the circuit keeps.
        most: edges to draw; the strongest are.

    Raises:
        InterventionError: the circuit is empty.
        ReportError: the curve is of another circuit.
    """
    import plotly.graph_objects as go

    circuit.check_not_empty()
    if curve is not None and (curve.task, curve.circuit) != (circuit.task, repr(circuit)):
        raise ReportError(f"the curve is of {curve.circuit}, the graph of {circuit!r}", hint="make it for this circuit")
    places = _places(circuit.graph)
    fig = go.Figure()
    drawn, total = _add_edges(fig, circuit, places, most)
    _add_nodes(fig, circuit, places)
    n = len(circuit.graph.layers)
    layers = [f"L{i}" for i in range(n)]
    fig.update_layout(height=180 + 62 * (n + 2), hovermode="closest")
    fig.update_yaxes(tickvals=list(range(n + 2)), ticktext=["input", *layers, "logits"], showgrid=False, zeroline=False)
    heads = list(range(max(layer.n_heads for layer in circuit.graph.layers)))
    ticks = {"tickvals": [*heads, len(heads) + 0.5], "ticktext": [*map(str, heads), "MLP"]}
    fig.update_xaxes(title_text="head", showgrid=False, zeroline=False, **ticks)
    kept = "" if curve is None else f" {_kept(circuit, curve)}"
    what = f"{len(circuit.nodes)} nodes and {total:,} edges" if total else f"{len(circuit.nodes)} nodes"
    notes = [f"Sign of the scores: {circuit.sign}", f"Direction: {circuit.direction}."]
    if drawn < total:
        notes.append(f"The {drawn:,} strongest edges are drawn, of {total:,}; the table has all.")
    return figure(
        fig,
        title=f"Circuit of {circuit.task}",
        caption=f"{what}, by {circuit.method} on {circuit.metric}.{kept}",
        table=circuit.table,
        notes=tuple(notes),
        provenance=circuit.provenance,
    )


@of.register
def _(circuit: Circuit) -> View:
    """The circuit graph."""
    return circuit_graph(circuit)


def _kept(circuit: Circuit, curve: FaithfulnessCurve) -> str:
    size = circuit.n_edges if curve.level == "edge" else len(circuit.nodes)
    nearest = int(np.abs(np.array(curve.kept_absolute) - size).argmin())
    share = curve.absolute[nearest]
    measured = curve.kept_absolute[nearest]
    return f"The nearest measured size, {measured:,}, keeps {share:.0%} of the effect ({curve.ablation} ablation)."


def _places(graph: Graph) -> dict[str, tuple[float, float]]:
    """(x, y) of every node; kv groups that are shared stand below the middle of their heads."""
    widest = max(layer.n_heads for layer in graph.layers)
    places = {"input": ((widest - 1) / 2, 0.0), "logits": ((widest - 1) / 2, len(graph.layers) + 1.0)}
    for i, layer in enumerate(graph.layers):
        size = layer.n_heads // layer.n_kv_heads
        for head in range(layer.n_heads):
            places[f"a{i}.h{head}"] = (float(head), i + 1.0)
        for group in range(layer.n_kv_heads):
            places[f"a{i}.kv{group}"] = (group * size + (size - 1) / 2, i + 0.7)
        places[f"m{i}"] = (widest + 0.5, i + (1.0 if layer.parallel else 1.3))
    return places


def _add_edges(fig: Any, circuit: Circuit, places: dict[str, tuple[float, float]], most: int) -> tuple[int, int]:
    """Lines in classes of strength and sign; how many were drawn, and how many there are."""
    import plotly.graph_objects as go

    graph = circuit.graph
    pairs = circuit.edges_in.nonzero().tolist()
    scored = [(float(circuit.edge_scores[s, r].nan_to_num(0.0)), s, r) for s, r in pairs]
    scored.sort(key=lambda one: -abs(one[0]))
    lines: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
    for rank, (score, s, r) in enumerate(scored[:most]):
        share = (rank + 1) / len(scored)
        strength = next(i for i, (limit, _, _) in enumerate(_CLASSES) if share <= limit)
        lines[strength, "raise" if score >= 0 else "lower"].append((s, r))
    for (strength, sign), members in sorted(lines.items(), reverse=True):
        _, width, name = _CLASSES[strength]
        x: list[float | None] = []
        y: list[float | None] = []
        for s, r in members:
            (x0, y0), (x1, y1) = places[graph.senders[s]], places[graph.receivers[r].partition("<")[0]]
            x += [x0, x1, None]
            y += [y0, y1, None]
        fig.add_trace(
            go.Scatter(
                x=x, y=y, mode="lines", name=f"{name}, {sign}", opacity=0.25 + 0.2 * (2 - strength), hoverinfo="skip",
                line={"width": width, "color": _COLOURS[sign]},
            )
        )  # fmt: skip
    return min(most, len(scored)), len(scored)


def _add_nodes(fig: Any, circuit: Circuit, places: dict[str, tuple[float, float]]) -> None:
    import plotly.graph_objects as go

    graph = circuit.graph
    scores = np.array([_score(circuit, name) for name in circuit.nodes])
    # The input feeds everything and would leave the others pale.
    inner = np.abs([s for s, name in zip(scores, circuit.nodes, strict=True) if name != "input" and np.isfinite(s)])
    largest = float(inner.max(initial=0.0)) or 1.0
    chosen = [head_of(name) for name in circuit.nodes]
    fig.add_trace(
        go.Scatter(
            x=[places[name][0] for name in circuit.nodes],
            y=[places[name][1] for name in circuit.nodes],
            mode="markers",
            name="nodes",
            text=[_about(circuit, name, score) for name, score in zip(circuit.nodes, scores, strict=True)],
            hovertemplate="%{text}<extra></extra>",
            customdata=[[-1, -1] if head is None else list(head) for head in chosen],
            meta={"select": ["layer", "heads"]},
            showlegend=False,
            marker={
                "size": [9 + 13 * (0.0 if np.isnan(s) else min(1.0, abs(s) / largest)) for s in scores],
                "color": np.nan_to_num(scores).tolist(),
                "cmin": -largest,
                "cmax": largest,
                "colorscale": [[0, _COLOURS["lower"]], [0.5, "#9a9a9a"], [1, _COLOURS["raise"]]],
                "colorbar": {"title": {"text": "score"}, "thickness": 12, "len": 0.6, "y": 0.3},
                "symbol": ["circle" if head_of(name) else "square" for name in circuit.nodes],
                "line": {"width": 1, "color": "#ffffff"},
            },
        )
    )
    outside = [name for name in graph.nodes if name not in set(circuit.nodes) and name in places]
    fig.add_trace(
        go.Scatter(
            x=[places[name][0] for name in outside], y=[places[name][1] for name in outside], mode="markers",
            name="not in the circuit", hoverinfo="skip", marker={"size": 4, "color": "#9a9a9a"}, opacity=0.5,
        )
    )  # fmt: skip


def _score(circuit: Circuit, name: str) -> float:
    return float("nan") if name not in circuit.graph.sender_index else circuit.score_of(name)


def _about(circuit: Circuit, name: str, score: float) -> str:
    """A node with its score and its strongest edges, one line each."""
    graph = circuit.graph
    lines = [label(name) if np.isnan(score) else f"{label(name)}: score {score:.3g}"]
    inside = circuit.edges_in
    if name in graph.sender_index:
        row = circuit.edge_scores[graph.sender_index[name]].nan_to_num(0.0) * inside[graph.sender_index[name]]
        lines += [f"to {label(graph.receivers[i])} {float(row[i]):.3g}" for i in _best(row)]
    columns = [i for i, receiver in enumerate(graph.receivers) if receiver.partition("<")[0] == name]
    for i in columns:
        column = circuit.edge_scores[:, i].nan_to_num(0.0) * inside[:, i]
        lines += [
            f"{graph.receivers[i]} from {label(graph.senders[j])} {float(column[j]):.3g}" for j in _best(column, 1)
        ]
    return "<br>".join(line.replace("<q>", " q").replace("<k>", " k").replace("<v>", " v") for line in lines)


def _best(values: Any, n: int = 2) -> list[int]:
    order = values.abs().argsort(descending=True)[:n].tolist()
    return [i for i in order if float(values[i]) != 0]
