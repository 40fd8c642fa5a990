"""Views of students whose attention was replaced: their maps beside their teacher's, and the losses of layers."""

from __future__ import annotations

import pandas as pd

from workbench.mechanisms.matvlm import Distillation, HybridMaps
from workbench.tokens import plotly_text
from workbench.views.base.drawing import SERIES
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import Figure, figure
from workbench.views.head_atlas import head_atlas


def _view_of_maps(found: HybridMaps) -> View:
    """Every replaced head on the atlas: how alike both maps are, and what is measured of each."""
    table = found.table

    def scores(value: str, *ends: str) -> pd.DataFrame:
        return table[["layer", "head", value, *ends]].rename(columns={value: "value"})

    metrics = {"cosine": scores("cosine")}
    metrics["more alike than others"] = table.assign(value=(found.alike - found.others).double().mean(1).numpy())[
        ["layer", "head", "value", "low", "high"]
    ]
    for name in ("rank", "distance", "entropy"):
        for whose in ("teacher", "student"):
            metrics[f"{name}, {whose}"] = scores(f"{name}, {whose}")
    metrics |= {"half-life": scores("half-life"), "signed mass": scores("signed mass")}
    unmatched = found.unmatched
    notes = [f"Not surely more like their own teacher than like the layer's others: {', '.join(unmatched)}."]
    return head_atlas(
        metrics, title="Maps of teacher and student", signed=False,
        caption=(
            "Cosine of each head's attention and |M| of the Mamba-2 head in its place, normalised per row; effective "
            f"ranks, and means over rows; {found.alike.shape[1]:,} examples." + (f" {notes[0]}" if unmatched else "")
        ),
        provenance=found.provenance,
    )  # fmt: skip


def _losses_of_maps(found: HybridMaps) -> list[View]:
    """The layer losses as bars."""
    import plotly.graph_objects as go

    frame = found.losses
    ends = {"array": frame["high"] - frame["loss"], "arrayminus": frame["loss"] - frame["low"]}
    bars = go.Bar(
        x=[plotly_text(site) for site in frame["site"]], y=frame["loss"], marker_color=SERIES[0],
        error_y={"type": "data", "symmetric": False, **ends},
    )  # fmt: skip
    fig = go.Figure(bars)
    fig.update_yaxes(title_text="‖r − t‖ / ‖t‖", rangemode="tozero")
    return [
        figure(
            fig,
            title="Losses of the replaced layers",
            caption="How far what a block gives is from what the teacher's gave on the same input; 95 % t intervals.",
            table=frame,
            provenance=found.provenance,
        )
    ]


def _view_of_distillation(found: Distillation) -> Figure:
    """The losses step by step."""
    import plotly.graph_objects as go

    fig = go.Figure()
    steps = list(range(1, len(found.logits) + 1))
    for i, site in enumerate(found.sites):
        line = {"color": SERIES[i % len(SERIES)]}
        fig.add_trace(
            go.Scatter(x=steps, y=found.layers[:, i].double().numpy(), name=plotly_text(site), mode="lines", line=line)
        )
    fig.add_trace(
        go.Scatter(
            x=steps, y=found.logits.double().numpy(), name="logits, nats", mode="lines", line={"color": "#808890"}
        )
    )
    fig.update_xaxes(title_text="step")
    fig.update_yaxes(title_text="loss", type="log")
    return figure(
        fig,
        title="Distillation",
        caption="Of each replaced layer ‖r − t‖ / ‖t‖ on the teacher's inputs, and the KL of the logits, by step.",
        table=found.table,
        provenance=found.provenance,
    )


register(HybridMaps, _view_of_maps, _losses_of_maps)
register(Distillation, _view_of_distillation)
