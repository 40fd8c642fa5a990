"""Views of how much heads can hold, and of conditioning experiments."""

from __future__ import annotations

import pandas as pd

from workbench.analysis.conditioning.capacity import Capacity
from workbench.analysis.conditioning.experiments import Conditioning
from workbench.tokens import plotly_text
from workbench.views.base import View
from workbench.views.drawing import SERIES
from workbench.views.figure import figure
from workbench.views.head_atlas import head_atlas
from workbench.views.of import of


@of.register
def _(capacity: Capacity) -> View:
    """The heads with the number of pairs they hold per rule, their load, and the dimension of their keys."""
    where = {"site": capacity.sites, "layer": capacity.layers, "head": capacity.heads}
    scores = {}
    for r, rule in enumerate(capacity.rules):
        for q, query in enumerate(capacity.queries):
            held = {"value": capacity.n_star[:, r, q], "low": capacity.n_low[:, r, q], "high": capacity.n_high[:, r, q]}
            scores[f"n* of {rule}, {query}"] = pd.DataFrame({**where, **{name: t.numpy() for name, t in held.items()}})
    for d, dimension in enumerate(capacity.dimensions):
        scores[f"dimension of the keys, {dimension}"] = pd.DataFrame(
            {**where, "value": capacity.dimension[:, d].numpy()}
        )
    scores["load"] = pd.DataFrame({**where, "value": capacity.effective_keys.numpy()})
    measure, threshold = capacity.criterion
    return head_atlas(
        scores,
        title="Capacity of the heads",
        caption=(
            f"n*: how many pairs a head's own keys and values hold until {measure} falls past {threshold:g}, up to "
            f"{capacity.sizes[-1]:,}; load: how many keys it really mixes."
        ),
        signed=False,
        provenance=capacity.provenance,
    )


@of.register
def _(found: Conditioning) -> View:
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
                marker_color=SERIES[s % len(SERIES)] if subject != "model" else "#555e68",
            )
        )
    fig.update_layout(barmode="group")
    fig.update_yaxes(title_text="experimental group minus control")
    silent = [name for name, why in zip(found.experiments, found.silent, strict=True) if why]
    notes = (f"The linear theory is silent about {', '.join(silent)}.",) if silent else ()
    return figure(
        fig,
        title="Conditioning",
        caption="The effect that each experiment has on each learning rule, with 95 % intervals; above 0 it shows.",
        table=found.table,
        notes=notes,
        provenance=found.provenance,
    )
