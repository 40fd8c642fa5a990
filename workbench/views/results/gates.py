"""Views of what gates do: their heads on the atlas, and their factors over positions or the image."""

from __future__ import annotations

import math

from workbench.analysis.gates import GateProfile
from workbench.counting import count
from workbench.tokens import plotly_text
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import figure
from workbench.views.head_atlas import head_atlas

_MOST = 12  # gates whose maps are drawn
_ACROSS = 4


def _view_of_profile(found: GateProfile) -> View:
    """Every head of every gate on the atlas: a strip for each gate."""
    frame = found.table
    scores = {
        label: frame[["layer", "head", "site", name]].rename(columns={name: "value"})
        for label, name in (
            ("mean factor", "mean"), ("spread over inputs", "by_input"), ("spread over positions", "by_position"),
            ("share below 0", "negative"),
        )
    }  # fmt: skip
    return head_atlas(
        scores, title="Gates", kind="gate",
        caption=f"The factor of each head of {count(len(found.gates), 'gate')}, over "
        f"{count(found.n_examples, 'example')} and all positions.",
        provenance=found.provenance,
    )  # fmt: skip


def _maps_of_profile(found: GateProfile) -> list[View]:
    """Mean factors over positions: an image where there is a grid, else a strip."""
    from plotly.subplots import make_subplots

    shown = found.gates[:_MOST]
    columns = min(_ACROSS, len(shown)) if any(found.grids[name][0] > 1 for name in shown) else 1
    rows = math.ceil(len(shown) / columns)
    values = [found.maps[name].double() for name in shown]
    said = [
        f"{plotly_text(name) or 'gate'}: {v.min():.3g} to {v.max():.3g}" for name, v in zip(shown, values, strict=True)
    ]
    fig = make_subplots(rows, columns, subplot_titles=said)
    for i, (name, v) in enumerate(zip(shown, values, strict=True)):
        at, (down, across) = {"row": i // columns + 1, "col": i % columns + 1}, found.grids[name]
        ends = {"zmin": float(v.min()), "zmax": float(v.max())}
        fig.add_heatmap(z=v.view(down, across).numpy(), **ends, showscale=False, name=name or "gate", **at)
        last, first = i + columns >= len(shown), i % columns == 0
        title = ("column" if down > 1 else "position") if last else ""
        fig.update_xaxes(title_text=title, tickvals=list(range(0, across, max(1, across // 8))), **at)
        title = "row" if first and down > 1 else ""
        fig.update_yaxes(title_text=title, tickvals=list(range(0, down, max(1, down // 8))), autorange="reversed", **at)
    fig.update_layout(height=max(240, 80 + rows * (220 if columns > 1 else 110)))
    left = "" if len(shown) == len(found.gates) else f" The first {len(shown)} of {len(found.gates):,} gates."
    return [
        figure(
            fig, title="Gates over positions",
            caption=f"The mean factor at each position, over {count(found.n_examples, 'example')} and the heads of a "
            f"gate; each map from its least to its greatest.{left}",
            table=found.table, provenance=found.provenance,
        )
    ]  # fmt: skip


register(GateProfile, _view_of_profile, _maps_of_profile)
