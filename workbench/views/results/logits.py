"""Views of what logits are made of: heads on the atlas, parts by layer, and the lens, layer by position."""

from __future__ import annotations

from typing import Any

import numpy as np

from workbench.analysis.logits import LogitAttribution, LogitLens
from workbench.tokens import plotly_text
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import figure
from workbench.views.head_atlas import head_atlas

_SHOWN = 14  # characters of a token in a cell


def _view_of_attribution(found: LogitAttribution) -> View:
    """Every head on the atlas."""
    frame = found.table
    heads = frame[frame["kind"] == "head"][["layer", "head", "site", "value", "low", "high"]]
    if len(set(heads["site"])) == len(set(heads["layer"])):
        heads = heads.drop(columns="site")
    return head_atlas(
        {"direct share": heads}, title="Direct logit attribution", unit="logits", signed=True,
        caption=f"What each head writes to the {found.asked}, {_over(found)}; {found.norm}.",
        provenance=found.provenance,
    )  # fmt: skip


def _more_of_attribution(found: LogitAttribution) -> list[View]:
    """All parts by layer."""
    import plotly.graph_objects as go

    frame = found.by_layer
    labels = ["input, last biases" if layer < 0 else f"L{layer}" for layer in sorted(set(frame["layer"]))]
    fig = go.Figure()
    for kind in dict.fromkeys(found.kinds):
        rows = frame[frame["kind"] == kind].set_index("layer")["value"]
        if not rows.abs().sum():
            continue
        values = [float(rows.get(layer, np.nan)) for layer in sorted(set(frame["layer"]))]
        fig.add_trace(go.Bar(x=labels, y=values, name={"head": "heads", "mlp": "MLP"}.get(kind, kind)))
    fig.update_layout(barmode="relative", height=320)
    fig.update_yaxes(title_text="logits")
    off = float(found.rounding.abs().max())
    return [
        figure(
            fig, title="Parts of the logit by layer",
            caption=(
                f"Shares of all parts in the {found.asked}, {_over(found)}. They sum to "
                f"{float(found.logits.mean()):.3f}, the model's own, up to {off:.1e}."
            ),
            table=found.table, notes=_notes(found), provenance=found.provenance,
        )
    ]  # fmt: skip


def _over(found: LogitAttribution) -> str:
    n = len(found.targets)
    return "of one prompt" if n == 1 else f"a mean over {n:,} prompts"


def _notes(found: LogitAttribution) -> tuple[str, ...]:
    if found.cap is None:
        return ()
    return (f"The logits are those before the model's softcap at {found.cap:g}.",)


def _view_of_lens(lens: LogitLens) -> View:
    """Layers up, positions across: the likeliest token, coloured by its probability."""
    return _map(
        lens, lens.top_probabilities[..., 0].double().numpy(), "probability",
        "Logit lens", "Each cell has the token that the stream after a layer says is next, and its probability.",
    )  # fmt: skip


def _more_of_lens(lens: LogitLens) -> list[View]:
    whose = "the asked token" if lens.given else "what the model says in the end"
    return [
        _map(
            lens,
            lens.probability.double().numpy(),
            "probability",
            "Logit lens: the target",
            f"The probability of {whose}.",
        ),
        _map(
            lens,
            lens.divergence.double().numpy(),
            "nats",
            "Logit lens: divergence",
            "KL(final ‖ lens), 0 in the last row.",
        ),
    ]


def _map(lens: LogitLens, values: Any, unit: str, title: str, caption: str) -> View:
    import plotly.graph_objects as go

    n, m = values.shape
    columns = [f"{i} {plotly_text(token, _SHOWN)}" for i, token in enumerate(lens.tokens)]
    known = lens.words
    words = [
        [plotly_text(known.get(int(i), str(int(i))), _SHOWN) for i in row] for row in lens.top_ids[..., 0].tolist()
    ]
    rows = ["input", *(f"L{i}" for i in range(n - 1))]
    fig = go.Figure(
        go.Heatmap(z=values, x=columns, y=rows, text=words, texttemplate="%{text}", colorbar={"title": unit})
    )
    fig.update_xaxes(title_text="token read", type="category")
    fig.update_yaxes(title_text="after layer", type="category")
    fig.update_layout(height=max(260, 110 + 26 * n), width=max(500, 120 + 64 * m))
    return figure(fig, title=title, caption=caption, table=lens.table, provenance=lens.provenance)


register(LogitAttribution, _view_of_attribution, _more_of_attribution)
register(LogitLens, _view_of_lens, _more_of_lens)
