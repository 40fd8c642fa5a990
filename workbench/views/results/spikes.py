"""Views of a spiking model's activity: rates over time, the raster, and what layers cost."""

from __future__ import annotations

import numpy as np

from workbench.analysis.spikes import SpikeActivity
from workbench.counting import count
from workbench.tokens import visible
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import figure

_ROW = 20  # pixels of a population
_NEURON = 3  # of a neuron in the raster


def _view_of_spikes(found: SpikeActivity) -> View:
    """Populations down, steps across: how often a neuron fires."""
    import plotly.graph_objects as go

    names, steps = [visible(name) for name in found.populations], [str(t + 1) for t in range(found.steps)]
    rates = go.Heatmap(z=found.rate.double().numpy(), x=steps, y=names, zmin=0, colorbar={"title": "rate"})
    fig = go.Figure(rates)
    fig.update_xaxes(title_text="step", type="category")
    fig.update_yaxes(title_text="neurons", type="category", autorange="reversed")
    fig.update_layout(height=max(240, 110 + _ROW * len(names)))
    dead, saturated = (
        100 * float(np.average(t.double().numpy(), weights=found.neurons)) for t in (found.dead, found.saturated)
    )
    return figure(
        fig, title="Spikes",
        caption=f"Spikes of a neuron at each step, a mean over neurons and {count(found.examples, 'example')}. "
        f"{dead:.1f} % of all neurons never fired, {saturated:.1f} % fired at every step.",
        table=found.table, provenance=found.provenance,
    )  # fmt: skip


def _more_of_spikes(found: SpikeActivity) -> list[View]:
    """The raster, and the energy of layers."""
    return [_raster(found)] + ([_energy(found)] if found.layers else [])


def _raster(found: SpikeActivity) -> View:
    import plotly.graph_objects as go

    rows = np.concatenate([found.of(name).numpy().T for name in found.populations]).astype(np.float64)
    counts = [found.of(name).shape[1] for name in found.populations]
    starts = np.cumsum([0, *counts[:-1]])
    fig = go.Figure(go.Heatmap(z=rows, x=[str(t + 1) for t in range(found.steps)], zmin=0, zmax=1, showscale=False))
    fig.update_xaxes(title_text="step", type="category")
    middle = [float(start + (n - 1) / 2) for start, n in zip(starts, counts, strict=True)]
    fig.update_yaxes(
        title_text="neurons", autorange="reversed", tickvals=middle, ticktext=[visible(n) for n in found.populations]
    )
    fig.update_layout(height=max(280, 110 + _NEURON * len(rows)))
    most = max(counts)
    return figure(
        fig, title="Spike raster",
        caption=f"A row is a neuron, up to {most} of each population; where it is coloured, the neuron fires. Of the "
        "first example.",
        provenance=found.provenance,
    )  # fmt: skip


def _energy(found: SpikeActivity) -> View:
    import plotly.graph_objects as go

    names = [visible(name) for name in found.layers]
    fig = go.Figure()
    for title, energy in (("as it runs", found.energy), ("one step, all multiplied", found.dense_energy)):
        fig.add_trace(go.Bar(x=names, y=(energy / 1e3).double().numpy(), name=title))
    fig.update_xaxes(title_text="layer", type="category")
    fig.update_yaxes(title_text="nanojoules per example")
    share = float(found.energy.sum() / found.dense_energy.sum())
    return figure(
        fig, title="Energy, estimated",
        caption=f"0.9 pJ for each spike and weight that it meets, 4.6 pJ where numbers are multiplied, at 45 nm. All "
        f"layers together take {share:.2f} of what one step of multiplications would. Attention's products, neurons, "
        "norms and memory are left out.",
        table=found.operations, provenance=found.provenance,
    )  # fmt: skip


register(SpikeActivity, _view_of_spikes, _more_of_spikes)
