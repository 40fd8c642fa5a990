"""Views of head importance: heads with scores and intervals, parts of heads, how methods agree, and pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from workbench.analysis.importance import HeadImportance, PruningCurve
from workbench.analysis.importance.scoring import METHODS
from workbench.tokens import plotly_text
from workbench.views.base.drawing import SERIES
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import figure
from workbench.views.head_atlas import head_atlas

if TYPE_CHECKING:
    from workbench.hooks.tap import Kind

_PARTED = 16  # heads whose parts are shown


def _view_of_head_importance(importance: HeadImportance) -> View:
    """The head atlas, one metric per method and measure; intervals are over examples."""
    table = importance.table.rename(columns={"head": "label"})
    several = len(importance.measures) > 1
    if len(set(importance.sites)) == len(set(importance.layers)):
        table = table.drop(columns="site")  # the layer tells the site, in this view as in others
    kinds = set(importance.kinds) - {"cross"} or {"cross"}  # which its alias tells
    where = [name for name in ("site", "layer", "number", "score", "low", "high") if name in table]
    scores: dict[str, Any] = {
        f"{method}, {measure}" if several else str(method): rows[where].rename(
            columns={"number": "head", "score": "value"}
        )
        for (method, measure), rows in table.groupby(["method", "measure"], sort=False)
    }
    measured = ", ".join(importance.measures)
    return head_atlas(
        scores,
        title="Head importance",
        caption=(
            f"How much worse the model is without each head, by {measured}, over {importance.n_examples:,} examples; "
            + _intervals(importance)
        ),
        signed=True,
        kind=cast("Kind", kinds.pop() if len(kinds) == 1 else "mixed"),
        provenance=importance.provenance,
    )


def _intervals(importance: HeadImportance) -> str:
    """Which intervals there are, in words."""
    ends = [importance.interval(*each) for each in importance.scores]
    if all(bool(each.isnan().all()) for each in ends):
        return "no t interval, since few of them carry the mean of any head: see the medians, or take more examples."
    return f"t intervals of the mean at {100 * importance.level:.4g}%, none where few examples carry it."


def _more_of_head_importance(importance: HeadImportance) -> list[View]:
    """Parts of heads beside the whole, where parts were pruned, and how the methods rank the heads alike."""
    found = []
    if any(method not in METHODS for method, _ in importance.scores) and ("zero", importance.measures[0]) in (
        importance.scores
    ):
        found.append(_parts(importance))
    if len(importance.scores) > 2:
        found.append(_agreement(importance))
    return found


def _parts(importance: HeadImportance) -> View:
    """Each head whole and by parts: bars with intervals, the most important heads first."""
    import plotly.graph_objects as go

    measure = importance.measures[0]
    methods = ["zero", *(m for m, of_measure in importance.scores if m not in METHODS and of_measure == measure)]
    ranked = importance.ranking("zero", measure, absolute=True)
    order = [importance.heads.index(label) for label in ranked[:_PARTED]]
    chosen = np.array([[importance.layers[i], importance.numbers[i]] for i in order])
    fig = go.Figure()
    for number, method in enumerate(methods):
        score = importance.score(method, measure).numpy()[order]
        ends = importance.interval(method, measure).numpy()[order]
        fig.add_trace(
            go.Bar(
                x=[plotly_text(importance.heads[i]) for i in order],
                y=score,
                error_y={"type": "data", "symmetric": False, "array": ends[:, 1] - score,
                         "arrayminus": score - ends[:, 0], "thickness": 1, "width": 0},
                name="whole head" if method == "zero" else plotly_text(method),
                hovertemplate="%{x}: %{y:.3g}",
                marker_color="#555e68" if method == "zero" else SERIES[(number - 1) % len(SERIES)],
                customdata=chosen,
                meta={"select": ["layer", "heads"]},
            )
        )  # fmt: skip
    fig.update_layout(barmode="group", bargap=0.25, height=380, legend={"orientation": "h", "y": 1.12, "x": 0})
    fig.update_xaxes(type="category", title_text="head")
    fig.update_yaxes(title_text=f"effect on {plotly_text(measure)}")
    table = importance.table
    table = table[(table["measure"] == measure) & table["method"].isin(methods)].drop(columns="rank")
    return figure(
        fig,
        title="Parts of heads",
        caption=(
            f"How much worse the model is by {measure} when a head loses all of its output, or what the named part of "
            f"it does: rows of queries, or what is read from keys up to k hops away (inside) or beyond (outside). "
            f"Intervals at {100 * importance.level:.4g}% over {importance.n_examples:,} examples. Parts need not add "
            "up to the whole."
        ),
        table=table,
        notes=(f"The {_PARTED} most important of {len(ranked):,} heads.",) if len(ranked) > _PARTED else (),
        provenance=importance.provenance,
    )


def _agreement(importance: HeadImportance) -> View:
    """Rank correlations between methods and measures."""
    import plotly.graph_objects as go

    frame = importance.correlations
    one = len(importance.measures) == 1
    names = [plotly_text((name.rpartition(", ")[0] if one else name).replace("_", " ")) for name in frame.columns]
    fig = go.Figure(
        go.Heatmap(z=frame.to_numpy(), x=names, y=names, zmid=0, zmin=-1, zmax=1, colorbar={"title": "correlation"},
                   texttemplate="%{z:.2f}")
    )  # fmt: skip
    fig.update_yaxes(autorange="reversed")
    fig.update_layout(height=max(280, 110 + 26 * len(names)))
    return figure(
        fig,
        title="How methods agree",
        caption=f"Spearman's rank correlation of the scores of {len(importance.heads):,} heads; grey is not known.",
        provenance=importance.provenance,
    )


def _view_of_pruning_curve(curve: PruningCurve) -> View:
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


register(HeadImportance, _view_of_head_importance, _more_of_head_importance)
register(PruningCurve, _view_of_pruning_curve)
