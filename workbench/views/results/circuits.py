"""Views of what is measured of circuits: faithfulness, patching, roles, stability, repair."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from workbench.analysis.circuits.faithfulness import Faithfulness
from workbench.analysis.circuits.faithfulness_curve import FaithfulnessCurve
from workbench.analysis.circuits.model.names import label, number_of, site_of
from workbench.analysis.circuits.patching import HeadPatching, LayerPatching
from workbench.analysis.circuits.repair import Repair
from workbench.analysis.circuits.roles import ROLES, HeadRoles
from workbench.analysis.circuits.shares import Denominator
from workbench.analysis.circuits.stability import Stability
from workbench.analysis.statistics.intervals import bracketed
from workbench.tokens import plotly_text
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import band, figure
from workbench.views.head_atlas import head_atlas

_MOST_BARS = 40
_PLACE = 24  # characters of a position and its token


def _view_of_faithfulness_curve(curve: FaithfulnessCurve) -> View:
    """The share of the effect that is kept, by the size of the circuit; the metric itself where no share is defined."""
    import plotly.graph_objects as go

    shares = curve.denominator.defined
    table, x = curve.table if shares else curve.in_metric, list(curve.fractions)
    fig = go.Figure(band(x, table["low"], table["high"]))
    for name, column, dash in (("by magnitude", "absolute", "solid"), ("by signed score", "signed", "dot")):
        fig.add_trace(
            go.Scatter(x=x, y=list(table[column]), name=name, mode="lines+markers", line={"dash": dash, "width": 2})
        )
    full, none = float(curve.full.mean()), float(curve.none.mean())
    for level, said in ((1.0, ""),) if shares else ((full, "whole model"), (none, "all ablated")):
        above = shares or level == max(full, none)  # what the lines are said to be may not lie over each other
        fig.add_hline(
            y=level, line={"width": 1, "dash": "dash", "color": "#888888"}, annotation_text=said,
            annotation_position="top right" if above else "bottom right",
        )  # fmt: skip
    fig.update_xaxes(title_text=f"share of the {curve.level}s kept", type="log")
    fig.update_yaxes(title_text="share of the effect" if shares else plotly_text(curve.metric))
    kept = (
        f"What the circuit keeps of {curve.metric} when everything else is ablated ({curve.ablation}); 1 is the whole "
        f"model. CPR {curve.cpr:.3f} (higher is better), CMD {curve.cmd:.3f} (0 is best)."
    )
    return figure(
        fig,
        title=f"Faithfulness on {curve.task}",
        caption=kept if shares else _undefined(curve.denominator, curve.metric, curve.ablation, full, none),
        table=table,
        notes=("The band is a 95 % interval over prompts.",),
        provenance=curve.provenance,
    )


def _view_of_faithfulness(found: Faithfulness) -> View:
    """Faithfulness, incompleteness and minimality as bars; the metric itself where no share is defined."""
    if not found.denominator.defined:
        frame, full, none = found.in_metric, float(found.full.mean()), float(found.none.mean())
        return _bars(
            list(frame["of"]), frame, found.metric, title=f"Faithfulness on {found.task}", provenance=found.provenance,
            caption=f"{found.circuit}. {_undefined(found.denominator, found.metric, found.ablation, full, none)}",
        )  # fmt: skip
    table = found.table
    names = [f"{row.quantity} {row.of}".strip() for row in table.itertuples()]
    return _bars(
        names, table, "share", title=f"Faithfulness on {found.task}", provenance=found.provenance,
        caption=f"{found.circuit}: {found.value:.3f} of the effect is kept ({found.ablation} ablation).",
    )  # fmt: skip


def _undefined(whole: Denominator, metric: str, ablation: str, full: float, none: float) -> str:
    """Why no share is drawn, with both values that it would be between."""
    return (
        f"Shares of the effect are undefined: {whole}. Drawn is {metric} itself, {full:.3g} of the whole model and "
        f"{none:.3g} with all ablated ({ablation})."
    )


def _view_of_head_patching(patching: HeadPatching) -> View:
    """The head atlas, one metric per place."""
    shares = patching.denominator.defined
    table = patching.table.rename(columns={"score" if shares else "effect": "value"})
    scores: dict[str, Any] = {}
    for place in patching.places:
        rows = table.loc[table["position"] == place].reset_index(drop=True)
        scores[str(place)] = _placed(rows["head"]).join(rows[["value", "low", "high"]])
    return head_atlas(
        scores, title=f"Patching of {patching.activation}", signed=True, provenance=patching.provenance,
        caption=(
            f"{patching.activation} of each head, {patching.direction}, on {patching.task}: effect on "
            f"{patching.metric}"
            + (
                f" as a share of the difference between prompts and twins. {patching.sign}"
                if shares
                else f" itself. Shares are undefined: {patching.denominator}."
            )
        ),
    )  # fmt: skip


def _view_of_layer_patching(patching: LayerPatching) -> View:
    """Layers up, positions across, of the first stream."""
    return _layers_by_position(patching, patching.streams[0])


def _more_of_layer_patching(patching: LayerPatching) -> list[View]:
    """The other streams."""
    return [_layers_by_position(patching, stream) for stream in dict.fromkeys(patching.streams[1:]) if
            stream != patching.streams[0]]  # fmt: skip


def _layers_by_position(patching: LayerPatching, stream: str) -> View:
    import plotly.graph_objects as go

    rows = [i for i, one in enumerate(patching.streams) if one == stream]
    shares = patching.denominator.defined
    scores = (patching.scores if shares else patching.effects.mean(-1))[rows].double().numpy()
    there = [j for j in range(len(patching.places)) if not np.isnan(scores[:, j]).all()]
    columns = [
        plotly_text(f"{patching.places[j]} {patching.tokens[j]}".rstrip(), _PLACE) for j in there
    ]  # fmt: skip
    again = [columns[:i].count(name) for i, name in enumerate(columns)]
    columns = [name + (f" ({n + 1})" if n else "") for name, n in zip(columns, again, strict=True)]
    fig = go.Figure(
        go.Heatmap(
            z=scores[:, there], x=columns, y=[plotly_text(patching.rows[i]) for i in rows],
            colorbar={"title": "share" if shares else plotly_text(patching.metric)},
        )
    )  # fmt: skip
    fig.update_xaxes(title_text="position", type="category")
    fig.update_yaxes(title_text="layer", type="category")
    fig.update_layout(height=max(260, 150 + 26 * len(rows)), width=max(500, 140 + 40 * len(there)))
    low, high = float(patching.corrupted.mean()), float(patching.clean.mean())
    return figure(
        fig, title=f"Patching of {patching.activation}" + (f", {stream}" if stream else ""),
        caption=(
            f"{patching.activation} of one layer at a time, {patching.direction}, on {patching.task}: effect on "
            f"{patching.metric}"
            + (
                f" as a share of the difference between prompts ({high:.3g}) and twins ({low:.3g}). {patching.sign}"
                if shares
                else f" itself. Shares are undefined: {patching.denominator}."
            )
        ),
        table=patching.table, provenance=patching.provenance,
    )  # fmt: skip


def _view_of_head_roles(roles: HeadRoles) -> View:
    """The head atlas, one metric per kind of evidence; the suggested roles in the caption."""
    scores: dict[str, Any] = {}
    for name, values in roles.evidence.items():
        if not bool(values.isfinite().any()):
            continue
        scores[name] = _with_gaps(_placed(roles.heads).assign(value=values.tolist()))
    named = [f"{role}: {', '.join(roles.of(role))}" for role in ROLES if roles.of(role)]
    some = any(len(frame) > len(roles.heads) for frame in scores.values())
    return head_atlas(
        scores, title=f"Roles of heads on {roles.task}", provenance=roles.provenance,
        caption=f"Suggested where attention reaches {roles.threshold:g}. {'; '.join(named) or 'No head has a role'}."
        + (" Heads in grey were not asked about." if some else ""),
    )  # fmt: skip


def _view_of_stability(stability: Stability) -> View:
    """How often each item is in the circuit, the most frequent ones."""
    table = stability.table
    always = table["frequency"] >= 1
    # Full bars say nothing: those that come and go are drawn, if any do.
    some = table if always.all() else table[~always]
    shown = some.head(_MOST_BARS)
    names = [
        label(item) + ("" if inside else " (not in it)")
        for item, inside in zip(shown["item"], shown["in_circuit"], strict=True)
    ]
    frame = pd.DataFrame({"value": shown["frequency"].to_numpy(), "low": np.nan, "high": np.nan})
    cut = f" {int(always.sum()):,} of {len(table):,} are in every draw"
    rest = "" if len(some) == len(shown) else f", the first {len(shown)} of them"
    cut += "." if always.all() else f"; the others are drawn, the most frequent first{rest}."
    return _bars(
        names, frame, f"share of draws of {stability.unit}", title="Stability of the circuit",
        caption=(
            f"How often each {stability.level} is in the circuit when {stability.unit} are drawn anew; mean Jaccard "
            f"overlap with the circuit {float(stability.jaccard.mean()):.2f}.{cut}"
        ),
        table=table, provenance=stability.provenance,
    )  # fmt: skip


def _view_of_repair(fixed: Repair) -> View:
    """Accuracy before and after, head by head, and with random heads."""
    table = fixed.table
    accuracies = table[~table["quantity"].str.startswith("attention")]
    names = [str(row.of if row.quantity == "single" else row.quantity) for row in accuracies.itertuples()]
    before, after = float(fixed.before.mean()), float(fixed.together.mean())
    change, low, high = fixed.change
    return _bars(
        names, accuracies, "accuracy", title=f"Repair of {fixed.task}",
        caption=(
            f"{', '.join(fixed.heads)} put on {', '.join(fixed.towards)} (without {fixed.but}) from the last token: "
            f"accuracy {before:.3f} before and {after:.3f} after, a change of {change:.3f} {bracketed(low, high)} "
            f"prompt by prompt; {fixed.broken:.1%} of the prompts were right and are wrong after."
        ),
        table=table, provenance=fixed.provenance,
    )  # fmt: skip


def _placed(heads: Iterable[str]) -> pd.DataFrame:
    """One row per head, by its label: layer, head, and its site where a layer has several."""
    labels = list(heads)
    rows = [(*(number_of(text) or (-1, -1)), site_of(text)) for text in labels]
    frame = pd.DataFrame(rows, columns=["layer", "head", "site"])
    return frame if frame["site"].notna().all() else frame.drop(columns="site")


def _with_gaps(frame: pd.DataFrame) -> pd.DataFrame:
    """With a row of NaN for each head that is missing, up to the last head of any layer: all rows are equally long."""
    places = frame.drop(columns=["head", "value"]).drop_duplicates()
    every = places.merge(pd.DataFrame({"head": range(int(frame["head"].max()) + 1)}), how="cross")
    return every.merge(frame, how="left")


def _bars(
    names: list[str], frame: pd.DataFrame, unit: str, *, title: str, caption: str, provenance: Any,
    table: pd.DataFrame | None = None,
) -> View:  # fmt: skip
    """Horizontal bars with intervals, the first on top."""
    import plotly.graph_objects as go

    values, low, high = (frame[name].to_numpy(dtype=float) for name in ("value", "low", "high"))
    again = [names[:i].count(name) for i, name in enumerate(names)]
    places = [plotly_text(name) + (f" ({n + 1})" if n else "") for name, n in zip(names, again, strict=True)]
    errors = {"array": (high - values).tolist(), "arrayminus": (values - low).tolist(), "type": "data"}
    known = bool(np.isfinite(low).any())
    bars = go.Bar(x=values.tolist(), y=places, orientation="h", name=unit, error_x=errors if known else None)
    fig = go.Figure(bars)
    fig.update_yaxes(type="category", autorange="reversed")
    fig.update_xaxes(title_text=plotly_text(unit))
    fig.update_layout(height=140 + 24 * len(names), showlegend=False)
    return figure(fig, title=title, caption=caption, table=frame if table is None else table, provenance=provenance)


register(FaithfulnessCurve, _view_of_faithfulness_curve)
register(Faithfulness, _view_of_faithfulness)
register(HeadPatching, _view_of_head_patching)
register(LayerPatching, _view_of_layer_patching, _more_of_layer_patching)
register(HeadRoles, _view_of_head_roles)
register(Stability, _view_of_stability)
register(Repair, _view_of_repair)
