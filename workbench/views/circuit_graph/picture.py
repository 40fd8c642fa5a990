"""The still picture of a circuit graph: layers upwards, heads across, edges as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.views.base import scales

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 250
WIDTH = 7.5  # inches
_POINTS = np.linspace(0, 1, 17)
_LONGEST = 14  # letters of a name beside its node


@dataclass(frozen=True)
class Line:
    """One edge: nodes at its ends, a weight from 0 to 1, colour and dashes."""

    start: int
    end: int
    weight: float
    colour: str
    dash: str = "solid"


@dataclass(frozen=True)
class Mark:
    """One node that is drawn: its colour ("" for none) and shape, what stands below it, whether it is chosen."""

    colour: str
    shape: str = "o"
    said: str = ""
    chosen: bool = False


def places(nodes: Sequence[Mapping[str, Any]], n_layers: int) -> list[tuple[float, float]]:
    """(x, y) of every node: heads at their number, MLPs in a column of their own, kv groups below their heads."""
    widest = 1 + max((node["number"] for node in nodes if node["kind"] == "head"), default=0)
    found = []
    for node in nodes:
        layer, kind = node["layer"], node["kind"]
        if kind == "head":
            found.append((node["number"], layer + 1.0))
        elif kind == "kv":
            found.append((node["number"], layer + 0.65))
        elif kind == "mlp":
            found.append((widest + 0.3, layer + (1.3 if node["raised"] else 1.0)))
        else:
            alike = [other["name"] for other in nodes if other["kind"] == kind and other["layer"] == layer]
            step = widest / (len(alike) + 1)
            found.append((step * (1 + alike.index(node["name"])) - 0.5, 0.0 if kind == "input" else n_layers + 1.0))
    return found


def height_of(rows: Sequence[str]) -> float:
    """Inches that so many layers take."""
    return 0.9 + 0.46 * (len(rows) + 2)


def draw(
    panel: Axes, nodes: Sequence[Mapping[str, Any]], rows: Sequence[str], marks: Mapping[int, Mark],
    lines: Sequence[Line],
) -> None:  # fmt: skip
    """Draw marked nodes, the others as dots, and the heaviest lines."""
    from matplotlib.collections import LineCollection

    spots = places(nodes, len(rows))
    drawn = sorted(lines, key=lambda line: line.weight)[-MOST_LINES:]
    curves = [_curve(spots[line.start], spots[line.end]) for line in drawn]
    if curves:
        panel.add_collection(
            LineCollection(
                curves, colors=[line.colour for line in drawn], linestyles=[line.dash for line in drawn],
                linewidths=[0.4 + 2.6 * line.weight**0.5 for line in drawn],
                alpha=[0.15 + 0.65 * line.weight**0.5 for line in drawn], zorder=1,
            )
        )  # fmt: skip
    muted, paper = panel.xaxis.label.get_color(), panel.get_facecolor()
    for i, (x, y) in enumerate(spots):
        mark = marks.get(i)
        if mark is None:
            panel.plot(x, y, ".", markersize=2, color=muted, alpha=0.4, zorder=2)
            continue
        face = mark.colour or paper
        edge, width = (scales.accent(), 2.2) if mark.chosen else (muted, 0.7)
        panel.plot(x, y, mark.shape, markersize=15, color=face, markeredgecolor=edge, markeredgewidth=width, zorder=3)
        ink = scales.ink_on(mark.colour) if mark.colour else muted
        panel.annotate(
            nodes[i]["short"],
            (x, y),
            ha="center",
            va="center",
            fontsize=5.5 if len(nodes[i]["short"]) < 5 else 4.5,
            color=ink,
            zorder=4,
            parse_math=False,
        )
        if mark.said:
            text = mark.said if len(mark.said) <= _LONGEST else mark.said[: _LONGEST - 1] + "…"
            panel.annotate(
                text, (x, y), xytext=(0, -9), textcoords="offset points", ha="center", va="top", fontsize=6,
                zorder=5, parse_math=False,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": paper, "edgecolor": "none"},
            )  # fmt: skip
    panel.set_yticks(range(len(rows) + 2), ["input", *rows, "logits"])
    panel.set_xticks([])
    panel.set_xlim(-0.8, max(x for x, _ in spots) + 0.8)
    panel.set_ylim(-0.6, len(rows) + 1.6)
    panel.tick_params(length=0)
    for side in panel.spines.values():
        side.set_visible(False)


def _curve(start: tuple[float, float], end: tuple[float, float]) -> Any:
    """[point, 2] of a curve that leaves upwards and arrives from below."""
    (x0, y0), (x1, y1) = start, end
    bend = max(0.3, abs(y1 - y0) / 2)
    corners = np.array([(x0, y0), (x0, y0 + bend), (x1, y1 - bend), (x1, y1)])
    t = _POINTS[:, None]
    weights = np.hstack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
    return weights @ corners
