"""Views of what a cache drops: the loss of each head, and for the head that loses most which keys it sees when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from workbench.analysis.eviction import Eviction
from workbench.counting import count
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import figure
from workbench.views.head_atlas import head_atlas

_MOST = 256  # queries and keys in a picture
_LINES = 4


def _view_of_eviction(found: Eviction) -> View:
    """Every head on the atlas."""
    frame = found.table
    frame = frame.assign(keys=frame["keys"] / found.lost.shape[-1])
    intervals = bool(frame["low"].notna().any())
    return head_atlas(
        {
            "weight lost": _frame(frame, "lost", intervals), "of the worst query": _frame(frame, "worst", False),
            "keys left at the end": _frame(frame, "keys", False),
        },
        title=f"Eviction: {found.policy}", unit="share", signed=False,
        caption=(
            f"Weight of a query on keys that a cache has dropped which keeps {found.budget}; a mean over the queries "
            f"of {count(found.lost.shape[1], 'example')}."
        ),
        provenance=found.provenance,
    )  # fmt: skip


def _more_of_eviction(found: Eviction) -> list[View]:
    """What the heads that lose most lose query by query, and which keys the first of them sees."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    frame, n = found.table, found.lost.shape[-1]
    first = frame.iloc[0].to_dict()
    at = _place(found, first)
    step = -(-n // _MOST)
    leaves = found.leaves[at, 0].numpy()
    places = np.arange(0, n, step)
    seen = np.where(leaves[None, places] > places[:, None], 1.0, 0.0)
    seen[(places[None] > places[:, None]) | (leaves[None, places] < 0)] = np.nan
    name = f"L{first['layer']}H{first['head']}"
    fig = make_subplots(rows=1, cols=2, subplot_titles=["weight lost", f"keys that {name} sees"])
    for row in frame.head(_LINES).to_dict("records"):
        lost = found.lost[_place(found, row), 0].double().tolist()
        line = go.Scatter(x=list(range(n)), y=lost, name=f"L{row['layer']}H{row['head']}", mode="lines")
        fig.add_trace(line, row=1, col=1)
    cells = go.Heatmap(z=seen.tolist(), x=places.tolist(), y=places.tolist(), zmin=0, zmax=1, showscale=False)
    fig.add_trace(cells, row=1, col=2)
    fig.update_xaxes(title_text="query", row=1, col=1)
    fig.update_yaxes(title_text="share of its weight", row=1, col=1)
    fig.update_xaxes(title_text="key", row=1, col=2)
    fig.update_yaxes(title_text="query", autorange="reversed", row=1, col=2)
    fig.update_layout(height=360)
    every = "" if step == 1 else f" Every {step}th query and key is drawn."
    return [
        figure(
            fig, title=f"Eviction: {found.policy}, query by query",
            caption=(
                f"Of the first example: weight on dropped keys, of the heads that lose most, and which keys {name} "
                f"keeps ({found.budget}).{every}"
            ),
            table=frame, provenance=found.provenance,
        )
    ]  # fmt: skip


def _place(found: Eviction, row: Mapping[Any, Any]) -> int:
    wanted = tuple(row[name] for name in ("layer", "head", "site"))
    return list(zip(found.layers, found.numbers, found.sites, strict=True)).index(wanted)


def _frame(table: pd.DataFrame, value: str, interval: bool) -> pd.DataFrame:
    columns = ["layer", "head", value, *(["low", "high"] if interval else [])]
    return table[columns].rename(columns={value: "value"})


register(Eviction, _view_of_eviction, _more_of_eviction)
