"""Views of attention rollout: the tokens by their shares, and the shares layer by layer."""

from __future__ import annotations

from workbench.analysis.rollout import AttentionRollout
from workbench.tokens import plotly_text, visible
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import figure
from workbench.views.token_strip import token_strip

_SHOWN = 14  # characters of a token
_COLUMNS = 40  # tokens in the map by layer
_CHANNELS = 8  # targets in the strip


def _view_of_rollout(found: AttentionRollout) -> View:
    """The tokens, coloured by their shares in each target."""
    targets = range(len(found.targets))[-_CHANNELS:]
    channels = {_name(found, i): found.rollout[i].double().numpy() for i in targets}
    return token_strip(
        found.tokens, channels, unit="share", signed=False, title=f"Attention rollout: {found.method}",
        caption=f"Shares of the input's tokens by the last layer; {found.assumed}.", provenance=found.provenance,
    )  # fmt: skip


def _more_of_rollout(found: AttentionRollout) -> list[View]:
    """Of the last target: what it is made of before each attention."""
    import plotly.graph_objects as go

    shares = found.shares[:, -1].double()
    chosen = sorted(shares.amax(0).argsort(descending=True)[:_COLUMNS].tolist())
    columns = [f"{i} {plotly_text(found.tokens[i], _SHOWN)}" for i in chosen]
    rows = [*(f"before {plotly_text(site)}" for site in found.sites), "end"]
    fig = go.Figure(go.Heatmap(z=shares[:, chosen].numpy(), x=columns, y=rows, zmin=0, colorbar={"title": "share"}))
    fig.update_xaxes(title_text="token", type="category")
    fig.update_yaxes(type="category")
    fig.update_layout(height=max(260, 110 + 24 * len(rows)), width=max(560, 240 + 26 * len(columns)))
    less = "" if len(chosen) == len(found.tokens) else f" The {_COLUMNS} tokens with the largest shares are shown."
    return [
        figure(
            fig, title="Attention rollout by layer",
            caption=f"What {_name(found, -1)} is made of, as positions of the stream before each attention.{less}",
            table=found.table, provenance=found.provenance,
        )
    ]  # fmt: skip


def _name(found: AttentionRollout, i: int) -> str:
    at = found.targets[i]
    return f"{at} {visible(found.tokens[at])}"


register(AttentionRollout, _view_of_rollout, _more_of_rollout)
