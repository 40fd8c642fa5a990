"""Views of what heads can do by their weights: copying on the atlas, pairs as maps, vectors as a table of tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from workbench.analysis.weights import CompositionScores, OVCopying, SingularVectors
from workbench.analysis.weights.composition import KINDS
from workbench.tokens import plotly_text
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import figure
from workbench.views.head_atlas import head_atlas

_SHOWN = 12  # characters of a token in a cell


def _view_of_copying(found: OVCopying) -> View:
    """Every head on the atlas."""
    scores = pd.DataFrame({"layer": found.layers, "head": found.numbers, "value": found.scores.numpy()})
    return head_atlas(
        {"copying": scores}, title="OV copying", unit="score", signed=True,
        caption="Σλ / Σ|λ| of each head's OV circuit in the vocabulary: 1 copies what it attends to, −1 suppresses it.",
        provenance=found.provenance,
    )  # fmt: skip


def _view_of_composition(found: CompositionScores) -> View:
    """Heads that write by heads that read; Q, K and V beside each other."""
    from plotly.subplots import make_subplots

    labels = list(found.labels)
    fig = make_subplots(cols=3, shared_yaxes=True, subplot_titles=[f"{kind}-composition" for kind in KINDS])
    values = found.scores.double().numpy()
    for i in range(3):
        fig.add_heatmap(
            z=values[i], x=labels, y=labels, col=i + 1, row=1, zmin=0, zmax=float(np.nanmax(values)), showscale=i == 2
        )
    fig.update_xaxes(title_text="head that reads", type="category")
    fig.update_yaxes(type="category")
    fig.update_yaxes(title_text="head that writes", col=1)
    fig.update_layout(height=420, width=1100)
    at = f" at distance {found.distance}" if found.distance else ""
    return figure(
        fig, title="Composition of heads", provenance=found.provenance, table=found.table,
        caption=f"Frobenius norms of products, over those of the factors{at}. Random heads do not have 0.",
    )  # fmt: skip


def _view_of_vectors(found: SingularVectors) -> View:
    """A row per head, vector and sign: the tokens of both sides, and how far they lie along it."""
    import plotly.graph_objects as go

    words = dict(zip(found.word_ids, found.word_texts, strict=True))
    n_heads, n_vectors, _, top = found.left_ids.shape
    shape = (n_heads * n_vectors * 2, 2 * top)
    values = torch.stack([found.left_scores, found.right_scores], -2).double().abs()
    values = values / values.amax(-1, keepdim=True).clamp_min(1e-300)
    ids = torch.stack([found.left_ids, found.right_ids], -2).reshape(shape)
    rows = [
        f"L{layer}H{head} {vector}{sign}"
        for layer, head in zip(found.layers, found.numbers, strict=True)
        for vector in range(n_vectors)
        for sign in "+−"
    ]
    columns = [f"{side} {i + 1}" for side in found.sides for i in range(top)]
    texts = [[plotly_text(words[int(i)], _SHOWN) for i in row] for row in ids.tolist()]
    fig = go.Figure(
        go.Heatmap(
            z=values.reshape(shape).numpy(), x=columns, y=rows, text=texts, texttemplate="%{text}", zmin=0, zmax=1,
            colorbar={"title": "of the first"},
        )
    )  # fmt: skip
    fig.update_xaxes(type="category")
    fig.update_yaxes(type="category", autorange="reversed")
    fig.update_layout(height=max(260, 110 + 26 * shape[0]), width=max(600, 160 + 64 * shape[1]))
    what = "W_V W_O" if found.circuit == "ov" else f"W_Q W_Kᵀ at distance {found.distance}"
    return figure(
        fig, title=f"Singular vectors: {found.circuit.upper()}", table=found.table, provenance=found.provenance,
        caption=f"Tokens farthest along (+) and against (−) the singular vectors of {what}; share is of its square.",
    )  # fmt: skip


register(OVCopying, _view_of_copying)
register(CompositionScores, _view_of_composition)
register(SingularVectors, _view_of_vectors)
