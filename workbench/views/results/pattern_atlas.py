"""Views of a pattern atlas: the map of all heads, the clusters with their mean patterns, and the evidence for names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workbench.analysis.atlas import PatternAtlas
from workbench.analysis.atlas.names import UNNAMED
from workbench.counting import count
from workbench.views.base.drawing import SERIES
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import figure
from workbench.views.head_atlas import head_atlas
from workbench.views.head_gallery import Axes, Group, head_gallery

_SAMPLES = 2000  # points of single examples on the map
_COLOURS = (*SERIES, "#0f8a8a", "#a04545")


def _view_of_pattern_atlas(atlas: PatternAtlas) -> View:
    """The map: each head large, with the number of its cluster, and its pattern on each example small."""
    import plotly.graph_objects as go

    fig = go.Figure()
    heads = np.array([atlas.layers, atlas.heads]).T
    every = max(1, -(-atlas.sample_xy.shape[0] * len(heads) // _SAMPLES))
    kept = np.arange(0, atlas.sample_xy.shape[0], every)
    for c in range(atlas.n_clusters):
        rows = (atlas.clusters == c).nonzero()[:, 0].numpy()
        colour, name = _COLOURS[c % len(_COLOURS)], _cluster(atlas, c)
        xy = atlas.sample_xy[kept][:, rows].numpy().reshape(-1, 2)
        which = np.column_stack([np.tile(heads[rows], (len(kept), 1)), np.repeat(kept, len(rows))])
        fig.add_trace(
            go.Scatter(
                x=xy[:, 0],
                y=xy[:, 1],
                mode="markers",
                marker={"color": colour, "size": 4},
                opacity=0.3,
                name=f"examples of cluster {c}",
                legendgroup=str(c),
                showlegend=False,
                text=[f"L{layer}H{head}, example {x}" for layer, head, x in which],
                hovertemplate="%{text}<extra></extra>",
                customdata=which,
                meta={"select": ["layer", "heads", "example"]},
            )
        )
    for c in range(atlas.n_clusters):
        rows = (atlas.clusters == c).nonzero()[:, 0].numpy()
        colour, name = _COLOURS[c % len(_COLOURS)], _cluster(atlas, c)
        fig.add_trace(
            go.Scatter(
                x=atlas.xy[rows, 0].numpy(),
                y=atlas.xy[rows, 1].numpy(),
                mode="markers+text",
                marker={"color": colour, "size": 17, "line": {"width": 1, "color": "#ffffff"}},
                text=[str(c)] * len(rows),
                textposition="middle center",
                textfont={"color": "#ffffff", "size": 10},
                hovertext=[f"{atlas.labels[i]}: {atlas.head_names[i]}" for i in rows],
                hovertemplate="%{hovertext}<extra></extra>",
                name=name,
                legendgroup=str(c),
                customdata=heads[rows],
                meta={"select": ["layer", "heads"]},
            )
        )
    share = [f"{float(part):.0%}" for part in atlas.explained]
    fig.update_xaxes(title_text=f"first component, {share[0]} of the variance")
    fig.update_yaxes(title_text=f"second component, {share[1]}")
    fig.update_layout(height=460)
    notes = [] if every == 1 else [f"Small points are every {every}th example's."]
    if float(atlas.explained.sum()) < 0.5:
        notes.append("The two axes hold less than half of the variance: heads that look close may lie far apart.")
    if atlas.unnamed:
        notes.append(
            f"{count(len(atlas.unnamed), 'head')} without a name: the patterns captured show nothing that tells their "
            "kind, as where no query sees more than one token."
        )
    return figure(
        fig,
        title="Map of patterns",
        caption=(
            f"Each large point is a head at the mean of its patterns over {len(atlas.error):,} examples, each small "
            "one its pattern on one of them, by the two main axes of what an autoencoder keeps. Numbers and colours "
            "are clusters, named by the evidence that their heads share."
        ),
        table=atlas.table,
        notes=tuple(notes),
        provenance=atlas.provenance,
    )


def _more_of_pattern_atlas(atlas: PatternAtlas) -> list[View]:
    """The clusters with every head's pattern, and content dependence and the evidence as a head atlas."""
    return [_gallery(atlas), _evidence(atlas)]


def _gallery(atlas: PatternAtlas) -> View:
    members = [(atlas.clusters == c).nonzero()[:, 0].tolist() for c in range(atlas.n_clusters)]
    numbers = {f"like {name}": atlas.evidence[:, i].numpy() for i, name in enumerate(atlas.names)}
    numbers["content dependence"] = atlas.content_dependence.numpy()
    numbers["error of the reconstruction"] = atlas.error.mean(0).numpy()
    what = "patches in raster order" if atlas.kind == "image" else "the text from its first to its last token"
    return head_gallery(
        atlas.patterns.numpy(),
        list(zip(atlas.layers, atlas.heads, strict=True)),
        axes=Axes("query, pooled", "key, pooled"),
        labels=atlas.labels,
        sites=_sites(atlas),
        said=[UNNAMED if name == UNNAMED else f"suggested name: {name}" for name in atlas.head_names],
        groups=[
            Group(f"{_cluster(atlas, c)}", rows, atlas.cluster_patterns[c].numpy()) for c, rows in enumerate(members)
        ],
        numbers={name: values for name, values in numbers.items() if np.isfinite(values).any()},
        title="Clusters of patterns",
        caption=(
            f"Patterns of heads, means over {len(atlas.error):,} examples, pooled to {atlas.size} x {atlas.size} cells "
            f"over {what}; the first of a cluster is the mean of its heads. Names follow from evidence measured on "
            "whole patterns: 0 is what uniform attention has, 1 all that there can be; for “uniform” the entropy, and "
            "for “content” c / (1 + c), with c how much the pattern varies over examples."
        ),
        provenance=atlas.provenance,
    )


def _evidence(atlas: PatternAtlas) -> View:
    where: dict[str, Any] = {"layer": atlas.layers, "head": atlas.heads}
    if (sites := _sites(atlas)) is not None:
        where["site"] = sites
    columns = {"content dependence": atlas.content_dependence} | {
        f"like {name}": atlas.evidence[:, i] for i, name in enumerate(atlas.names)
    }
    scores = {
        name: pd.DataFrame({**where, "value": values.numpy()})
        for name, values in columns.items()
        if bool(values.isfinite().any())
    }
    return head_atlas(
        scores,
        title="Evidence for names",
        caption=(
            "Content dependence is the mean of ‖A − Ā‖ / ‖Ā‖ over examples, of pooled patterns: 0 for a head whose "
            "pattern is the same on all of them. The others are the evidence for each name."
        ),
        signed=False,
        provenance=atlas.provenance,
    )


def _cluster(atlas: PatternAtlas, cluster: int) -> str:
    return f"{cluster}: {atlas.cluster_names[cluster]}, {count(len(atlas.members(cluster)), 'head')}"


def _sites(atlas: PatternAtlas) -> list[str] | None:
    """Names of sites, where the layer alone does not tell them."""
    several = len(set(atlas.sites)) > len(set(atlas.layers))
    return list(atlas.sites) if several else None


register(PatternAtlas, _view_of_pattern_atlas, _more_of_pattern_atlas)
