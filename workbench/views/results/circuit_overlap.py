"""Views of the overlap of two circuits: the graph of what they share, and how much they share by chance."""

from __future__ import annotations

import numpy as np

from workbench.analysis.circuits.overlap_result import CircuitOverlap
from workbench.views.base.drawing import SERIES
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.circuit_graph import overlap_graph
from workbench.views.circuit_graph.overlap import WARNING, caption_of
from workbench.views.figure import band, figure


def overlap_chance(overlap: CircuitOverlap) -> View:
    """Random circuits beside the measured overlap, and the overlap of circuits of equal size."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    fig = make_subplots(rows=1, cols=2, subplot_titles=["heads renamed at random", "at matched sizes"])
    null = overlap.null.double().numpy()
    counts, edges = np.histogram(null, bins=min(30, max(1, len(np.unique(null)))))
    middles = (edges[:-1] + edges[1:]) / 2
    bars = go.Bar(x=middles.tolist(), y=counts.tolist(), name="random", marker={"color": "#9a9a9a"})
    fig.add_trace(bars, row=1, col=1)
    own = overlap.values["jaccard"]
    measured = go.Scatter(
        x=[own, own], y=[0, int(counts.max())], mode="lines", name="measured", line={"width": 3, "color": SERIES[0]},
        showlegend=False,
    )  # fmt: skip
    fig.add_trace(measured, row=1, col=1)
    if "low" in overlap.curve:
        fig.add_trace(band(list(overlap.sizes), overlap.curve["low"], overlap.curve["high"]), row=1, col=2)
    for name, dash in (("jaccard", "solid"), ("expected", "dot")):
        lines = go.Scatter(
            x=list(overlap.sizes), y=list(overlap.curve[name]), mode="lines+markers",
            name="measured" if name == "jaccard" else "by chance", line={"dash": dash, "color": SERIES[0]},
        )  # fmt: skip
        fig.add_trace(lines, row=1, col=2)
    fig.update_xaxes(title_text="Jaccard overlap", row=1, col=1)
    fig.update_yaxes(title_text="draws", row=1, col=1)
    fig.update_xaxes(title_text=f"{overlap.unit} in each", type="log", row=1, col=2)
    fig.update_yaxes(title_text="Jaccard overlap", row=1, col=2)
    fig.update_layout(height=320)
    return figure(
        fig,
        title=f"Overlap of {overlap.tasks[0]} and {overlap.tasks[1]}, against chance",
        caption=caption_of(overlap),
        table=overlap.table,
        notes=(
            "By chance: one circuit with its heads renamed at random within their layers.",
            "The band is a 95 % interval of the mean overlap of circuits from as many new prompts.",
            WARNING,
        ),
        provenance=overlap.provenance,
    )


def _chance(overlap: CircuitOverlap) -> list[View]:
    return [overlap_chance(overlap)]


register(CircuitOverlap, overlap_graph, _chance)
