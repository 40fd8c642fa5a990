"""Views of head importance: the heads with their scores and intervals, and what pruning them costs."""

from __future__ import annotations

from typing import Any

from workbench.analysis.importance import HeadImportance, PruningCurve
from workbench.tokens import plotly_text
from workbench.views.base import View
from workbench.views.figure import figure
from workbench.views.head_atlas import head_atlas
from workbench.views.of import of


@of.register
def _(importance: HeadImportance) -> View:
    """The head atlas, one metric per method and measure; intervals are over examples."""
    table = importance.table.rename(columns={"head": "label"})
    several = len(importance.measures) > 1
    scores: dict[str, Any] = {
        f"{method}, {measure}" if several else str(method): rows[
            ["site", "layer", "number", "score", "low", "high"]
        ].rename(columns={"number": "head", "score": "value"})
        for (method, measure), rows in table.groupby(["method", "measure"], sort=False)
    }
    measured = ", ".join(importance.measures)
    return head_atlas(
        scores,
        title="Head importance",
        caption=(
            f"How much worse the model is without each head, by {measured}, over {importance.n_examples:,} examples; "
            f"intervals of the mean at {importance.level:.0%} by {importance.n_bootstrap:,} bootstrap draws."
        ),
        signed=True,
        provenance=importance.provenance,
    )


@of.register
def _(curve: PruningCurve) -> View:
    """Each measure against the number of heads pruned, in the scored order and at random."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    table = curve.table
    fig = make_subplots(rows=1, cols=len(curve.measures), subplot_titles=[plotly_text(name) for name in curve.measures])
    for column, measure in enumerate(curve.measures, 1):
        for name in curve.orders:
            rows = table[(table["order"] == name) & (table["measure"] == measure)]
            chosen = name == curve.by
            fig.add_trace(
                go.Scatter(
                    x=rows["pruned"].to_numpy(),
                    y=rows["value"].to_numpy(),
                    name=plotly_text(name),
                    mode="lines+markers" if chosen else "lines",
                    line={"width": 3 if chosen else 1, "dash": "solid" if chosen else "dot"},
                    legendgroup=name,
                    showlegend=column == 1,
                ),
                row=1,
                col=column,
            )
        fig.update_xaxes(title_text="heads pruned", row=1, col=column)
    most = f"{curve.counts[-1]:,} heads pruned the model runs {float(curve.speedup[-1]):.2f} times as fast"
    speed = "" if curve.reason else f" With {most}."
    return figure(
        fig,
        title="Pruning",
        caption=(
            f"{', '.join(curve.measures)} as heads are pruned, by {curve.by} and at random, of {curve.n_heads:,}."
            f"{speed}"
        ),
        table=table,
        notes=(f"No speed: {curve.reason}",) if curve.reason else (),
        provenance=curve.provenance,
    )
