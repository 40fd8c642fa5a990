"""The still picture of a saliency map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.analysis.saliency.normalising import standardised
from workbench.views.base import drawing, scales
from workbench.views.base.selection import Selection
from workbench.views.base.spec import ViewSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_COLOURS = {"row": "each token from least to largest", "all": "one scale for all tokens", "z": "standardised per token"}


def draw(figure: Figure, spec: ViewSpec, chosen: Selection) -> None:
    """Spectrogram under a map of the chosen token, or the mean over tokens; attention of the chosen heads, the map and
    their difference by token. Which map lies where and how rows are coloured is the view's state.
    """
    facts, blocks, state = spec.facts, spec.blocks, spec.state
    labels = [each["label"] for each in facts["maps"]]
    at = labels.index(state["map"]) if state.get("map") in labels else 0
    scale = state.get("scale", "row")
    n, about = len(facts["tokens"]), facts["maps"][at]
    token = chosen.token if chosen.token is not None and chosen.token < n else None
    names = ["map"] if facts["attention"] is None else ["attention", "map", "difference"]
    heights = [max(0.35, 0.16 * n)] * len(names)
    if facts["picture"] is not None:
        names, heights = ["picture", *names], [1.7, *heights]
    panels = figure.subplots(len(names), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    strip = np.asarray(blocks[f"strip{at}"], dtype=np.float64)
    looked, who = (None, "") if facts["attention"] is None else _attention(spec, chosen)
    end = facts["positions"] * facts["step"]
    for name, axes in zip(names, panels, strict=True):
        if name == "picture":
            _picture(axes, spec, token, looked)
        elif name == "difference":
            rows = _standard(looked) - _standard(strip)
            title = f"Difference: attention − {about['label']}, rows standardised"
            _rows(axes, facts, rows, title, signed=True)
        elif name == "attention":
            signed = bool(facts["attention"]["signed"])
            title = f"Cross-attention, {who}, {_COLOURS[scale]}"
            _rows(axes, facts, _scaled(looked, signed, scale), title, signed=signed or scale == "z")
        else:
            label = f"{about['label'][:1].upper()}{about['label'][1:]}"
            unit = f" ({about['unit']})" if about["unit"] else ""
            title = f"{label}{unit}, {_COLOURS[scale]}"
            signed = about["signed"] or scale == "z"
            _rows(axes, facts, _scaled(strip, about["signed"], scale), title, signed=signed)
        if name != "picture" and token is not None:
            axes.add_patch(scales.frame_of(0, token, end, 1))
        axes.set_xlim(0, end)
    if facts["names"] and facts["positions"] <= 60:
        panels[-1].set_xticks(np.arange(facts["positions"]) + 0.5, facts["names"], rotation=90, family="monospace")
    else:
        panels[-1].set_xlabel({"s": "seconds", "frame": "frame", "position": "position"}[facts["unit"]])


def _attention(spec: ViewSpec, chosen: Selection) -> tuple[np.ndarray, str]:
    """[token, position] attention of the chosen heads or layer, of the alignment heads, or of all; and whose it is."""
    about, every = spec.facts["attention"], np.asarray(spec.blocks["attention"], dtype=np.float64)
    layers, heads = list(about["layers"]), about["heads"]
    if chosen.site is None and chosen.layer in layers:
        of_layer = every[layers.index(chosen.layer)]
        some = [head for head in chosen.heads if head < heads]
        if some:
            return of_layer[some].mean(0), f"L{chosen.layer}H{'+'.join(map(str, some))}"
        if not chosen.heads:
            return of_layer.mean(0), f"mean of layer {chosen.layer}"
    if spec.state.get("heads") == "alignment":
        pairs = [(layers.index(a), b) for a, b in about["alignment"] if a in layers and b < heads]
        return np.mean([every[pair] for pair in pairs], axis=0), "mean of the alignment heads"
    return every.mean((0, 1)), "mean of all heads"


def _standard(rows: Any) -> np.ndarray:
    cells = np.asarray(rows, dtype=np.float64)
    known = np.isfinite(cells)
    found: np.ndarray = standardised(torch.from_numpy(np.where(known, cells, 0.0)), torch.from_numpy(known)).numpy()
    return np.where(known, found, np.nan)


def _scaled(rows: Any, signed: bool, scale: str) -> np.ndarray:
    """Each row from its least to its largest, as SPES scales them; signed ones by their largest size."""
    if scale != "row":
        return _standard(rows) if scale == "z" else np.asarray(rows)
    low = 0.0 if signed else np.nanmin(rows, 1, keepdims=True)
    width = np.nanmax(np.abs(rows) if signed else rows, 1, keepdims=True) - low
    found: np.ndarray = (rows - low) / np.where(width > 0, width, 1)
    return found


def _rows(axes: Axes, facts: Mapping[str, Any], rows: Any, title: str, *, signed: bool = False) -> None:
    low, high = scales.limits(rows, signed=signed)
    end = facts["positions"] * facts["step"]
    axes.imshow(
        rows, aspect="auto", extent=(0, end, len(rows), 0), vmin=low, vmax=high,
        cmap=scales.diverging() if signed else scales.sequential(),
    )  # fmt: skip
    axes.set_facecolor(scales.unseen_colour())
    axes.set_title(title, fontsize=8.5)
    every = max(1, len(rows) // 30)
    places = np.arange(0, len(rows), every)
    axes.set_yticks(places + 0.5, [facts["tokens"][i][:14] for i in places], fontsize=7, family="monospace")
    axes.tick_params(length=0)


def _picture(axes: Axes, spec: ViewSpec, token: int | None, looked: Any) -> None:
    """The spectrogram in grey; over it, in colour, what lies above the mean of a map, or of attention."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    facts, blocks = spec.facts, spec.blocks
    picture = blocks["picture"]
    end = len(picture) * facts["picture"]["step"]
    place: Any = {"aspect": "auto", "origin": "lower", "extent": (0, end, 0, picture.shape[1])}
    paper, ink = _themed()
    axes.imshow(picture.T, cmap=LinearSegmentedColormap.from_list("grey", [paper, ink]), vmin=0, vmax=320, **place)
    found = _over(spec, looked)
    title = "Spectrogram"
    if found is not None:
        label, cells, step = found
        rows = [token] if token is not None else [i for i, odd in enumerate(facts["special"]) if not odd]
        mean = _standard(cells)[rows or range(len(cells))].mean(0).clip(0)
        mean = mean[:, None] if mean.ndim == 1 else mean
        colour = np.broadcast_to(to_rgb(drawing.SERIES[1]), (*mean.T.shape, 3))
        alpha = 0.9 * mean.T / (mean.max() or 1)
        place["extent"] = (0, len(mean) * step, 0, picture.shape[1])
        axes.imshow(np.concatenate([colour, alpha[..., None]], -1), **place)
        whose = "mean over tokens" if token is None else f"“{facts['tokens'][token]}” ({token})"
        title += f"; in colour, where {label} is above its mean ({whose})"
    axes.set_title(title, fontsize=8.5)
    axes.set_ylabel(facts["picture"]["label"], fontsize=8)


def _over(spec: ViewSpec, looked: Any) -> tuple[str, Any, float] | None:
    """What lies over the spectrogram: its name, [token, frame] or [token, frame, bin], and the seconds of a frame."""
    facts, wanted = spec.facts, spec.state.get("over")
    labels = [each["label"] for each in facts["maps"]]
    first = next((i for i, each in enumerate(facts["maps"]) if each["cells"]), 0)
    if wanted == "":
        return None
    if wanted == "attention" and wanted not in labels and looked is not None:
        return "attention", looked, facts["step"]
    i = labels.index(wanted) if wanted in labels else first
    cells = facts["maps"][i]["cells"]
    if cells:
        return labels[i], spec.blocks[f"cells{i}"].astype(np.float64), cells["block"] * facts["picture"]["step"]
    return labels[i], np.asarray(spec.blocks[f"strip{i}"], dtype=np.float64), facts["step"]


def _themed() -> tuple[str, str]:
    import matplotlib as mpl

    return str(mpl.rcParams["figure.facecolor"]), str(mpl.rcParams["text.color"])
