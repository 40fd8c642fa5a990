"""Views of how much heads can hold, and of conditioning experiments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from workbench.analysis.conditioning.capacity import Capacity
from workbench.analysis.conditioning.experiments import MODEL, Conditioning
from workbench.errors import ReportError
from workbench.tokens import plotly_text
from workbench.views.base.drawing import SERIES
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.capacity_curves import MEASURE_LABELS
from workbench.views.figure import Figure, figure
from workbench.views.head_atlas import HeadAtlas, head_atlas

_MOST = 1.5  # size of a contrast that the bars show: 1 is all that there is to learn


def _view_of_capacity(capacity: Capacity) -> View:
    """The heads with the number of pairs they hold per rule, head-room, load, and how their keys lie."""
    where = {"site": capacity.sites, "layer": capacity.layers, "head": capacity.heads}

    def scores_of(**columns: Any) -> pd.DataFrame:
        return pd.DataFrame({**where, **{name: tensor.numpy() for name, tensor in columns.items()}})

    scores, room = {}, {}
    for r, rule in enumerate(capacity.rules):
        for q, query in enumerate(capacity.queries):
            held, low, high = (t[:, r, q] for t in (capacity.n_star, capacity.n_low, capacity.n_high))
            scores[f"n* of {rule}, {query}"] = scores_of(value=held, low=low, high=high)
        room[f"head-room of {rule}, {capacity.queries[0]}"] = scores_of(value=capacity.headroom[:, r, 0])
    scores |= room
    for d, dimension in enumerate(capacity.dimensions):
        scores[f"dimension of the keys, {dimension}"] = scores_of(value=capacity.dimension[:, d])
    scores["load"] = scores_of(value=capacity.effective_keys)
    scores["overlap of the keys over that of random ones"] = scores_of(value=capacity.excess)
    if capacity.importance is not None:
        scores["importance"] = scores_of(value=capacity.importance)
    measure, threshold = capacity.criterion
    view = head_atlas(
        scores,
        title="Capacity of the heads",
        caption=(
            f"n*: how many pairs a head's own keys and values hold until {MEASURE_LABELS[measure]} falls past "
            f"{threshold:g}, up to {capacity.sizes[-1]:,}; load: how many keys it really mixes; head-room: n* − load."
        ),
        provenance=capacity.provenance,
    )
    censored = int(capacity.censored.any(-1).any(-1).sum())
    said = f"{censored:,} heads hold even the largest number, by some rule and query: there n* is at least that."
    notes = (*view.spec.notes, *((said,) if censored else ()))
    return HeadAtlas(replace(view.spec, notes=notes))


def _view_of_conditioning(found: Conditioning) -> View:
    """The effect of each experiment on each rule, and on the model: bars with intervals."""
    import plotly.graph_objects as go

    fig = go.Figure()
    for s, subject in enumerate(found.subjects):
        value, low, high = (t[:, s].numpy() for t in (found.contrast, found.contrast_low, found.contrast_high))
        fig.add_trace(
            go.Bar(
                x=[name.replace("_", " ") for name in found.experiments],
                y=value,
                error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low},
                name=plotly_text(subject),
                marker_color=SERIES[s % len(SERIES)] if subject != MODEL else "#808890",
            )
        )
    fig.update_layout(barmode="group")
    fig.update_yaxes(title_text="experimental group minus control")
    fig.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, margin={"t": 60})
    notes: list[str] = []
    far = [(e, s) for e, s in np.argwhere(found.contrast.abs().numpy() > _MOST) if found.subjects[s] != MODEL]
    if far:
        fig.update_yaxes(range=[-_MOST, _MOST])
        names = sorted({found.subjects[s] for _, s in far}, key=found.subjects.index)
        top = float(found.contrast.abs().max())
        notes.append(
            f"Bars of {', '.join(names)} leave the chart, to {top:.3g} in the table: without error correction an "
            "association grows with every trial. Double-click for the whole."
        )
    silent = [name.replace("_", " ") for name, why in zip(found.experiments, found.silent, strict=True) if why]
    if silent:
        notes.append(f"The linear theory is silent about {' and '.join(silent)}.")
    return figure(
        fig,
        title="Conditioning",
        caption="The effect that each experiment has on each learning rule, with 95 % intervals; above 0 it shows.",
        table=found.table,
        notes=(*notes, *found.limits),
        provenance=found.provenance,
    )


def capacity_correlation(capacity: Capacity) -> Figure:
    """Spearman's ρ of each quantity of the heads with the importance that was given, with 95 % intervals.

    Raises:
        ReportError: no importance was given.
    """
    import plotly.graph_objects as go

    if not capacity.correlation:
        raise ReportError(
            "the result holds no importance to correlate with", hint="capacity(..., importance={(layer, head): score})"
        )
    names = list(capacity.correlation)
    value, low, high = ([capacity.correlation[name][i] for name in names] for i in range(3))
    fig = go.Figure(
        go.Scatter(
            x=value,
            y=[plotly_text(name) for name in names],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [b - a for a, b in zip(value, high, strict=True)],
                "arrayminus": [a - b for a, b in zip(value, low, strict=True)],
            },
            mode="markers",
            marker={"size": 9, "color": SERIES[0]},
            name="ρ",
        )
    )
    fig.update_xaxes(title_text="Spearman's ρ with the importance of the heads", range=[-1.02, 1.02], zeroline=True)
    fig.update_yaxes(autorange="reversed", type="category")
    fig.update_layout(height=110 + 34 * len(names), showlegend=False, margin={"l": 150})
    known = int(capacity.importance.isfinite().sum()) if capacity.importance is not None else 0
    return figure(
        fig,
        title="Capacity and importance",
        caption=(
            f"Rank correlation over {known:,} heads; bars are 95 % intervals, as if heads were drawn at random. A bar "
            "that crosses 0 is no evidence of a relation."
        ),
        table={"quantity": names, "rho": value, "low": low, "high": high},
        provenance=capacity.provenance,
    )


register(Capacity, _view_of_capacity)
register(Conditioning, _view_of_conditioning)
