"""The still picture of a saliency map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.analysis.saliency.normalising import standardised
from workbench.views.base import drawing, scales

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(figure: Figure, facts: Mapping[str, Any], blocks: Mapping[str, Any]) -> None:
    """Spectrogram under the first map (mean over tokens), then attention, the map and their difference by token."""
    n, about = len(facts["tokens"]), facts["maps"][0]
    names = ["map"] if facts["attention"] is None else ["attention", "map", "difference"]
    heights = [max(0.35, 0.16 * n)] * len(names)
    if facts["picture"] is not None:
        names, heights = ["picture", *names], [1.7, *heights]
    panels = figure.subplots(len(names), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    strip = np.asarray(blocks["strip0"], dtype=np.float64)
    mean = None if facts["attention"] is None else np.asarray(blocks["attention"], dtype=np.float64).mean((0, 1))
    end = facts["positions"] * facts["step"]
    for name, axes in zip(names, panels, strict=True):
        if name == "picture":
            _picture(axes, facts, blocks)
        elif name == "difference":
            rows = _standard(mean) - _standard(strip)
            title = f"Difference: attention − {about['label']}, rows standardised"
            _rows(axes, facts, rows, title, signed=True)
        elif name == "attention":
            title = "Cross-attention, mean of all heads, each token from least to largest"
            signed = bool(facts["attention"]["signed"])
            _rows(axes, facts, _scaled(mean, signed), title, signed=signed)
        else:
            label = f"{about['label'][:1].upper()}{about['label'][1:]}"
            unit = f" ({about['unit']})" if about["unit"] else ""
            title = f"{label}{unit}, each token from least to largest"
            _rows(axes, facts, _scaled(strip, about["signed"]), title, signed=about["signed"])
        axes.set_xlim(0, end)
    if facts["names"] and facts["positions"] <= 60:
        panels[-1].set_xticks(np.arange(facts["positions"]) + 0.5, facts["names"], rotation=90, family="monospace")
    else:
        panels[-1].set_xlabel({"s": "seconds", "frame": "frame", "position": "position"}[facts["unit"]])


def _standard(rows: Any) -> np.ndarray:
    found: np.ndarray = standardised(torch.from_numpy(np.asarray(rows, dtype=np.float64))).numpy()
    return found


def _scaled(rows: Any, signed: bool) -> np.ndarray:
    """Each row from its least to its largest, as SPES scales them; signed ones by their largest size."""
    low = 0.0 if signed else rows.min(1, keepdims=True)
    width = (np.abs(rows) if signed else rows).max(1, keepdims=True) - low
    found: np.ndarray = (rows - low) / np.where(width > 0, width, 1)
    return found


def _rows(axes: Axes, facts: Mapping[str, Any], rows: Any, title: str, *, signed: bool = False) -> None:
    low, high = scales.limits(rows, signed=signed)
    end = facts["positions"] * facts["step"]
    axes.imshow(
        rows, aspect="auto", extent=(0, end, len(rows), 0), vmin=low, vmax=high,
        cmap=scales.diverging() if signed else "viridis",
    )  # fmt: skip
    axes.set_title(title, fontsize=8.5)
    every = max(1, len(rows) // 30)
    places = np.arange(0, len(rows), every)
    axes.set_yticks(places + 0.5, [facts["tokens"][i][:14] for i in places], fontsize=7, family="monospace")
    axes.tick_params(length=0)


def _picture(axes: Axes, facts: Mapping[str, Any], blocks: Mapping[str, Any]) -> None:
    """The spectrogram in grey; over it, in colour, what lies above the mean of the first map with cells of its own."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    picture = blocks["picture"]
    end = len(picture) * facts["picture"]["step"]
    place: Any = {"aspect": "auto", "origin": "lower", "extent": (0, end, 0, picture.shape[1])}
    paper, ink = _themed()
    axes.imshow(picture.T, cmap=LinearSegmentedColormap.from_list("grey", [paper, ink]), vmin=0, vmax=320, **place)
    found = next((i for i, m in enumerate(facts["maps"]) if m["cells"]), None)
    title = "Spectrogram"
    if found is not None:
        cells, about = blocks[f"cells{found}"].astype(np.float64), facts["maps"][found]
        kept = [i for i, odd in enumerate(facts["special"]) if not odd] or list(range(len(cells)))
        mean = _standard(cells)[kept].mean(0).clip(0)
        colour = np.broadcast_to(to_rgb(drawing.SERIES[1]), (*mean.T.shape, 3))
        alpha = 0.9 * mean.T / (mean.max() or 1)
        place["extent"] = (0, len(mean) * about["cells"]["block"] * facts["picture"]["step"], 0, picture.shape[1])
        axes.imshow(np.concatenate([colour, alpha[..., None]], -1), **place)
        title += f"; in colour, where {about['label']} is above its mean (mean over tokens)"
    axes.set_title(title, fontsize=8.5)
    axes.set_ylabel(facts["picture"]["label"], fontsize=8)


def _themed() -> tuple[str, str]:
    import matplotlib as mpl

    return str(mpl.rcParams["figure.facecolor"]), str(mpl.rcParams["text.color"])
