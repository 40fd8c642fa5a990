"""Views of an attention profile: strength by hop, its trend over layers, offset maps, and the indicators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workbench.analysis.profile import AttentionProfile
from workbench.analysis.profile.result import bin_name
from workbench.counting import count
from workbench.tokens import visible
from workbench.views.base.drawing import SERIES
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import figure
from workbench.views.head_atlas import head_atlas
from workbench.views.head_gallery import Axes, head_gallery

_EVEN = "uniform"
_ROW = 17  # pixels of a head in the map of strength
_LABELLED = 60  # heads with a label each
_INDICATORS = {
    "mean_distance": "mean distance",
    "distance_spread": "spread of the distance",
    "entropy": "entropy, nats",
    "normalised_entropy": "entropy, share of the largest",
    "total_entropy": "entropy over all rows, nats",
    "concentration": "concentration",
    "head_diversity": "head diversity",
    "sink": "weight on the sink",
    "local_0": "local focus 0, itself",
    "local_1": "local focus 1",
    "local_2": "local focus 2",
    "local_3": "local focus 3",
    "cls_to_patches": "CLS to patches",
    "patches_to_cls": "patches to CLS",
}
_SINKS = {
    "separate": "what goes to {} is left out, and rows then sum to less than 1",
    "keep": "all weight counts",
    "drop": "what goes to {} is left out, and rows are scaled to sum 1",
}


def _view_of_attention_profile(profile: AttentionProfile) -> View:
    """Heads down, hops across: the share of a head's weight at each distance."""
    import plotly.graph_objects as go

    far = profile.of("mean_distance").tolist()
    order = sorted(range(len(far)), key=lambda i: (profile.layers[i], -np.nan_to_num(far[i]), i))
    labels = [profile.labels[i] for i in order]
    mass = profile.mass.numpy()[order]
    names, every = _selects(profile)
    chosen = [every[i] for i in order]
    if profile.kind == "image":
        labels, mass = [*labels, _EVEN], np.concatenate([mass, _uniform(profile)[None]])
        chosen.append([-1, -1, *[""] * (len(names) - 2)])
    unit = "hops" if profile.kind == "image" else "tokens"
    fig = go.Figure(
        go.Heatmap(
            z=mass,
            x=[bin_name(hops) for hops in profile.bins],
            y=labels,
            colorbar={"title": "weight"},
            customdata=[[row] * len(profile.bins) for row in chosen],
            meta={"select": names},
        )
    )
    fig.update_xaxes(title_text=f"distance in {unit}", type="category")
    shown = (
        labels if len(labels) <= _LABELLED else [name for i, name in enumerate(labels) if i % 8 == 0 or name == _EVEN]
    )
    fig.update_yaxes(title_text="head", type="category", autorange="reversed", tickvals=shown)
    fig.update_layout(height=max(260, 90 + _ROW * len(labels)))
    return figure(
        fig,
        title="How far heads look",
        caption=(
            f"Weight that a query gives to the keys at each distance, a mean over {_where(profile)}; {_sink(profile)}. "
            "Within a layer, heads that look farther stand first."
            + (
                " The last row is what uniform attention over the patches would give."
                if profile.kind == "image"
                else ""
            )
        ),
        table=profile.table[["site", "layer", "head", "label", *(f"mass_{bin_name(b)}" for b in profile.bins)]],
        notes=_skipped(profile),
        provenance=profile.provenance,
    )


def _more_of_attention_profile(profile: AttentionProfile) -> list[View]:
    """The trend over layers, the offset map of each head, and the indicators as a head atlas."""
    return [_trend(profile), offsets(profile), _indicators(profile)]


def _uniform(profile: AttentionProfile) -> Any:
    """[bin] weight at each hop if every patch looked at all alike: ordered pairs at that hop ÷ N²."""
    rows, columns = profile.grid
    down, right = (np.abs(np.subtract.outer(np.arange(n), np.arange(n))) for n in (rows, columns))
    hops = np.maximum(down[:, None, :, None], right[None, :, None, :])
    return np.array([((hops >= low) & (hops <= high)).mean() for low, high in profile.bins])


def _trend(profile: AttentionProfile) -> View:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    unit = "patches" if profile.kind == "image" else "tokens"
    panels = {
        f"mean distance, {unit}": "mean_distance",
        "entropy, share of the largest": "normalised_entropy",
        f"weight on {_sink_name(profile)}": "sink",
    }
    names, every = _selects(profile)
    fig = make_subplots(rows=1, cols=len(panels), horizontal_spacing=0.08, subplot_titles=list(panels))
    for column, (label, measure) in enumerate(panels.items(), 1):
        values, ends = profile.of(measure).numpy(), profile.interval(measure).numpy()
        known = np.isfinite(ends).all()
        fig.add_trace(
            go.Scatter(
                x=np.array(profile.layers),
                y=values,
                error_y={"type": "data", "array": ends[:, 1] - values, "arrayminus": values - ends[:, 0],
                         "symmetric": False, "thickness": 1, "width": 0, "color": SERIES[0]} if known else None,
                mode="markers",
                marker={"color": SERIES[0], "size": 7},
                name=f"{label}, a head",
                text=list(profile.labels),
                hovertemplate="%{text}: %{y:.3g}<extra></extra>",
                customdata=every,
                meta={"select": names},
            ),
            row=1, col=column,
        )  # fmt: skip
        rows = profile.trend[profile.trend["measure"] == measure]
        mean = rows.groupby("layer")["mean"].mean()
        fig.add_trace(
            go.Scatter(
                x=mean.index.to_numpy(),
                y=mean.to_numpy(),
                mode="lines",
                line={"color": SERIES[1], "width": 2},
                name=f"{label}, mean of the layer",
            ),
            row=1,
            col=column,
        )
        fig.update_xaxes(title_text="layer", dtick=max(1, len(mean) // 8), row=1, col=column)
        fig.update_yaxes(rangemode="tozero", row=1, col=column)
    fig.update_layout(height=300, showlegend=False, margin={"t": 30})
    bars = f"; bars are {profile.level:.0%} intervals over examples" if profile.n_examples > 1 else ""
    return figure(
        fig,
        title="Trend over layers",
        caption=f"Each point is a head, a mean over {_where(profile)}{bars}; the line is the mean of a layer's heads.",
        table=profile.trend,
        provenance=profile.provenance,
    )


def offsets(profile: AttentionProfile) -> View:
    """Where each head looks, relative to the query: a map over offsets, of text a row of bars."""
    maps = profile.offsets.numpy()
    rows, columns = maps.shape[1:]
    image = profile.kind == "image"
    middle = columns // 2
    if not image and not maps[..., middle + 1 :].any():
        maps = maps[..., : middle + 1]  # nobody looks ahead
    axes = Axes(
        rows="rows down",
        columns="columns to the right" if image else "tokens after the query",
        row0=-(rows // 2),
        column0=-middle,
        value="weight per query",
    )
    where = "the key that lies so many rows and columns" if image else "the key so many tokens"
    return head_gallery(
        maps,
        list(zip(profile.layers, profile.heads, strict=True)),
        axes=axes,
        labels=profile.labels,
        sites=_sites(profile),
        numbers=_named(profile),
        title="Where heads look, relative to the query",
        caption=(
            f"Weight that a query gives to {where} away, a mean over queries and over {_where(profile)}; "
            f"{_sink(profile)}. Far offsets exist for few queries and are small for that alone."
        ),
        provenance=profile.provenance,
    )


def _indicators(profile: AttentionProfile) -> View:
    where: dict[str, Any] = {"layer": profile.layers, "head": profile.heads}
    if (sites := _sites(profile)) is not None:
        where["site"] = sites
    scores = {}
    for label, values in _named(profile).items():
        ends = profile.interval(next(m for m, name in _INDICATORS.items() if name == label)).numpy()
        scores[label] = pd.DataFrame({**where, "value": values, "low": ends[:, 0], "high": ends[:, 1]})
    return head_atlas(
        scores,
        title="Indicators of heads",
        caption=(
            f"Means over {_where(profile)} with {profile.level:.0%} t intervals, "
            "as workbench.attention_profile defines them. Head diversity is one number per layer."
        ),
        signed=False,
        provenance=profile.provenance,
    )


def _named(profile: AttentionProfile) -> dict[str, Any]:
    """Measures that apply, by their names for readers."""
    found = {name: profile.of(measure).numpy() for measure, name in _INDICATORS.items()}
    return {name: values for name, values in found.items() if np.isfinite(values).any()}


def _selects(profile: AttentionProfile) -> tuple[list[str], list[list[Any]]]:
    """What a click on a head selects: the names, and the values of each head."""
    every: list[list[Any]] = [list(pair) for pair in zip(profile.layers, profile.heads, strict=True)]
    if (sites := _sites(profile)) is None:
        return ["layer", "heads"], every
    return ["layer", "heads", "site"], [[*row, visible(site)] for row, site in zip(every, sites, strict=True)]


def _sites(profile: AttentionProfile) -> list[str] | None:
    """Names of sites, where the layer alone does not tell them."""
    several = len(set(profile.sites)) > len(set(profile.layers))
    return list(profile.sites) if several else None


def _where(profile: AttentionProfile) -> str:
    return count(profile.n_examples, "image" if profile.kind == "image" else "text")


def _sink_name(profile: AttentionProfile) -> str:
    if profile.kind == "text":
        return "the first token"
    return "CLS" if profile.prefix == 1 else "the tokens before the patches"


def _sink(profile: AttentionProfile) -> str:
    if profile.kind == "image" and profile.prefix == 0:
        return "all weight counts"
    return _SINKS[profile.sink].format(_sink_name(profile))


def _skipped(profile: AttentionProfile) -> tuple[str, ...]:
    names = ", ".join(profile.skipped)
    return (f"Not shown, since their tokens have no distance: {names}.",) if names else ()


register(AttentionProfile, _view_of_attention_profile, _more_of_attention_profile)
