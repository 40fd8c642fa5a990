"""Views of a tracker's memory: which remembered frame each frame reads, and the tree of histories with its scores."""

from __future__ import annotations

from typing import Any

import torch

from workbench.analysis.memory import MemoryReading, MemoryTree
from workbench.tokens import plotly_text
from workbench.views.base.drawing import SERIES
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.figure import figure
from workbench.views.grounding import grounding
from workbench.views.grounding.view import CELLS

_MOST = 6  # heads that have a timeline of their own
_ACROSS = 3
_PLAIN = "#808890"


def _timeline(found: MemoryReading) -> View:
    """Frames down, remembered frames across: the mean of all heads, then heads."""
    from plotly.subplots import make_subplots

    total = found.weights + found.pointers  # [step, head, slot]
    last = int(found.held.max())
    maps = [("all heads", total.mean(1))] if len(found.labels) > 1 else []
    maps += [(label, total[:, h]) for h, label in enumerate(found.labels[:_MOST])]
    columns = min(_ACROSS, len(maps))
    rows = -(-len(maps) // columns)
    fig = make_subplots(rows, columns, subplot_titles=[plotly_text(name) for name, _ in maps], shared_yaxes=True)
    for i, (name, values) in enumerate(maps):
        grid = torch.full((len(found.frames), last + 1), torch.nan, dtype=torch.float64)
        for step, held in enumerate(found.held.tolist()):
            for slot, frame in enumerate(held):
                if frame >= 0:
                    grid[step, frame] = float(values[step, slot])
        at = {"row": i // columns + 1, "col": i % columns + 1}
        fig.add_heatmap(
            z=grid.numpy(), x=list(range(last + 1)), y=list(found.frames), zmin=0, zmax=1, name=plotly_text(name),
            showscale=i == 0, colorbar={"title": "weight"}, hoverongaps=False,
            hovertemplate="frame %{y} reads %{z:.3f} of frame %{x}<extra></extra>", **at,
        )  # fmt: skip
        fig.update_xaxes(title_text="remembered frame" if i + columns >= len(maps) else "", dtick=_step(last), **at)
        fig.update_yaxes(title_text="" if i % columns else "frame", autorange="reversed", **at)
    fig.update_layout(height=80 + 250 * rows)
    left = "" if len(found.labels) <= _MOST else f" The first {_MOST} of {len(found.labels):,} heads."
    return figure(
        fig, title="Memory timeline",
        caption="What each frame reads of each frame that it remembers: weight on its map and on its pointer to the "
        f"object, a mean over cells. Empty where the memory does not hold a frame.{left}",
        table=found.table, provenance=found.provenance,
    )  # fmt: skip


def _recalled(found: MemoryReading) -> list[View]:
    """What cells of the last frame recall, laid over the remembered frames: all cells, or as many as one view holds."""
    height, width = found.size.tolist()
    rows, columns = found.grid.tolist()
    frame, n = found.frames[-1], rows * columns
    patches = n * int(found.mapped[-1].sum())
    cells = range(0, n, max(1, -(-2 * n * patches // CELLS)))
    if not patches or 2 * patches > CELLS:
        return []
    pixels = [((i % columns + 0.5) * width / columns, (i // columns + 0.5) * height / rows) for i in cells]
    caption = (
        f"Each row is a cell of frame {frame}: what it reads of the maps of remembered frames, mean of heads first."
    )
    return [grounding(found.recall_of(frame, pixels), title=f"What frame {frame} recalls", caption=caption)]


def _step(n: int) -> int:
    return max(1, n // 8)


def _tree(found: MemoryTree) -> View:
    """Masks over frames by their score; pathways that went on, and the one that is believed."""
    import plotly.graph_objects as go

    believed, kept = set(found.best), [rank >= 0 for rank in found.kept]
    best: dict[int, float] = {}
    for frame, score in zip(found.frames, found.scores, strict=True):
        best[frame] = max(score, best.get(frame, score))
    below = [score - best[frame] for frame, score in zip(found.frames, found.scores, strict=True)]
    fig = go.Figure()
    for name, colour, width, chosen in (
        ("given up", _PLAIN, 1.0, lambda i: not kept[i]), ("went on", SERIES[0], 1.5, lambda i: kept[i]),
        ("believed", SERIES[1], 3.0, lambda i: i in believed),
    ):  # fmt: skip
        nodes = [i for i in range(len(found.frames)) if chosen(i) and (name == "believed" or i not in believed)]
        fig.add_trace(_edges(found, below, nodes, colour, width))
        said = [
            f"score {found.scores[i]:.3f}, mask {found.masks[i]}, overlap {found.overlaps[i]:.3f}, object "
            f"{found.logits[i]:.2f}" for i in nodes
        ]  # fmt: skip
        fig.add_scatter(
            x=[found.frames[i] for i in nodes], y=[below[i] for i in nodes], mode="markers", name=name,
            marker={"color": colour, "size": 5 + 2 * width}, text=said,
            hovertemplate="frame %{x}: %{text}<extra></extra>",
        )  # fmt: skip
    unsure = sorted({frame for frame, sure in zip(found.frames, found.certain, strict=True) if not sure})
    for frame in unsure:
        fig.add_vrect(
            x0=frame - 0.5, x1=frame + 0.5, fillcolor="rgba(128, 128, 128, 0.14)", line={"width": 0}, layer="below"
        )
    fig.update_xaxes(title="frame behind the prompt", dtick=_step(max(found.frames)))
    fig.update_yaxes(title="score, from the best of the frame")
    fig.update_layout(height=420)
    return figure(
        fig, title="Memory tree",
        caption="Every mask that was weighed, by the score of its history, Σ ln overlap, less the best score of its "
        f"frame; at most {found.paths} pathways go on. "
        f"Shaded are the {len(unsure)} frames on which no pathway was certain.",
        table=found.table, provenance=found.provenance,
    )  # fmt: skip


def _edges(found: MemoryTree, heights: list[float], nodes: list[int], colour: str, width: float) -> Any:
    """Lines from each node's parent to it, as one trace with gaps."""
    import plotly.graph_objects as go

    x: list[float | None] = []
    y: list[float | None] = []
    for i in nodes:
        parent = found.parents[i]
        if parent >= 0:
            x += [found.frames[parent], found.frames[i], None]
            y += [heights[parent], heights[i], None]
    line = {"color": colour, "width": width}
    return go.Scatter(x=x, y=y, mode="lines", line=line, showlegend=False, hoverinfo="skip")


register(MemoryReading, _timeline, _recalled)
register(MemoryTree, _tree)
