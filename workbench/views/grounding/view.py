"""Grounding: what heads read from the patches of pictures, laid over the pictures: all tiles, all heads, all rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.analysis.grounding import Grounding, ImagePlaces, grounding_of
from workbench.counting import count
from workbench.errors import ReportError
from workbench.tokens import visible
from workbench.views.base import scales
from workbench.views.base.selection import Selection, SharedSelection, inputs_of
from workbench.views.base.spec import Array, ViewSpec
from workbench.views.base.view import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from workbench.capture.capture import Capture

CELLS = 2_000_000
"""Weights that a view holds; with more, only those heads are kept that read the pictures most."""
_PICTURED = 6  # pictures of the still


class GroundingView(View):
    """See `grounding`."""

    def picture(self, figure: Figure) -> None:
        facts, blocks = self.spec.facts, self.spec.blocks
        row, at, show = self._row(), self._map(), self.state.get("show", "both")
        named = facts["pictures"]
        chosen = self.chosen.example
        start = 0 if chosen is None or chosen >= len(named) else max(0, min(chosen, len(named) - _PICTURED))
        shown = range(start, min(len(named), start + _PICTURED))
        tile = self._tile(row, at) if self.state.get("tiles") == "one" else None
        maps = {i: self._heat(i, row, at, tile) for i in shown}
        top = max(float(each.max()) for each in maps.values()) or 1.0
        parts = ["image", "weights"] if show == "both" else [show]
        figure.set_size_inches(max(3.6, 1.9 * len(shown)), 0.5 + 1.9 * len(parts))
        panels = figure.subplots(len(parts), len(shown), squeeze=False)
        for column, i in enumerate(shown):
            height, width = named[i]["height"], named[i]["width"]
            for part, panel in zip(parts, panels[:, column], strict=True):
                panel.set_axis_off()
                if part == "image":
                    panel.imshow(self._pixels(i))
                else:
                    panel.imshow(maps[i], extent=(0, width, height, 0), vmin=0, vmax=top)
            panels[0, column].set_title(named[i]["name"], fontsize=8)
            if i == chosen:
                panels[0, column].add_patch(scales.frame_of(0, 0, width, height))
        one = facts["rows"][row]
        mass = float(blocks["masses"][row, at, 0])
        figure.suptitle(f"{facts['maps'][at]['label']} at {one['position']} {one['token'][:24]}", fontsize=9)
        of = "one scale" if tile is None else f"{facts['tiles'][tile]['name']} alone"
        figure.supxlabel(f"{mass:.3g} of its weight is on {facts['masses'][0]}; {of}", fontsize=9)

    def _tile(self, row: int, at: int) -> int:
        """The tile of the chosen patch; that which is read most where none is chosen."""
        blocks = self.spec.blocks
        here = np.flatnonzero(blocks["positions"] == (-1 if self.chosen.key is None else self.chosen.key))
        if len(here):
            return int(blocks["tile"][here[0]])
        weights = (blocks["weights"][row, at].astype(np.float64) / 255) ** 2
        return int(np.bincount(blocks["tile"], weights, len(self.spec.facts["tiles"])).argmax())

    def _row(self) -> int:
        rows, query = self.spec.facts["rows"], self.chosen.query
        return next((i for i, one in enumerate(rows) if one["position"] == query), len(rows) - 1)

    def _map(self) -> int:
        for chosen in (self.chosen, Selection.of(self.spec.selection)):
            for i, one in enumerate(self.spec.facts["maps"]):
                if chosen.heads[:1] == (one["head"],) and chosen.has(one["layer"], one["head"], one["site"]):
                    return i
        return 0

    def _pixels(self, picture: int) -> Array:
        one = self.spec.facts["pictures"][picture]
        n = one["height"] * one["width"] * 3
        flat = self.spec.blocks["pixels"][one["start"] : one["start"] + n]
        return np.asarray(flat.reshape(one["height"], one["width"], 3))

    def _heat(self, picture: int, row: int, at: int, tile: int | None) -> Array:
        """[y, x] the weight on each pixel of a small map of a picture, or of one tile of it."""
        from workbench.analysis.grounding.tiles import raster

        facts, blocks = self.spec.facts, self.spec.blocks
        one = facts["pictures"][picture]
        of = np.array([facts["tiles"][t]["picture"] == picture and tile in (None, t) for t in blocks["tile"]])
        weights = torch.from_numpy((blocks["weights"][row, at, of].astype(np.float64) / 255) ** 2)
        scale = 96 / max(one["height"], one["width"])
        shown = (max(1, round(one["height"] * scale)), max(1, round(one["width"] * scale)))
        boxes = torch.from_numpy(blocks["boxes"][of].copy())
        drawn = raster(weights * float(blocks["tops"][row, at]), boxes, (one["full"][0], one["full"][1]), shown)
        return np.asarray(drawn.numpy())


def grounding(
    of: Grounding | Capture,
    images: ImagePlaces | None = None,
    *,
    at: int | Sequence[int] = -1,
    title: str = "Where the answer looks",
    caption: str | None = None,
    selection: SharedSelection | None = None,
    **how: Any,
) -> GroundingView:
    """What heads read from the patches of pictures where an answer is written, laid over the pictures.

    The mean of all heads comes first, then every head. The row, the head, the picture and the patch are part of the
    shared selection (`query`, `layer` and `heads`, `example`, `key`).

    Args:
        of: what `workbench.grounding` found, or a capture of a prompt with pictures.
        images: of a capture: where its pictures stand, as `workbench.image_places` gives it.
        at, how: of a capture: as `workbench.grounding` takes `at`, `sites` and `sinks`.

    Raises:
        ReportError: a capture without the places of its images, or too many rows and patches for one view.
        CaptureError, WorkbenchError: as `workbench.grounding`.
    """
    if isinstance(of, Grounding):
        found = of
    elif images is None:
        raise ReportError(
            "a capture does not tell where pictures stand among its tokens",
            hint="pass workbench.image_places(wb, inputs, images, processor), or what workbench.grounding found",
        )
    else:
        found = grounding_of(of, images, at=at, **how)
    rows, heads, patches = found.weights.shape
    fits = CELLS // (rows * patches) - 1
    if fits < 1:
        raise ReportError(f"{rows} rows and {patches} patches are too much for one view", hint="ask for fewer rows")
    kept = found.kept
    order = kept.sum(-1).amax(0).argsort(descending=True, stable=True)[:fits].sort().values.tolist()
    maps = torch.cat([kept.mean(1, keepdim=True), kept[:, order]], 1)
    sinks = torch.cat([found.sinks.any(0, keepdim=True), found.sinks[order]])
    tops = maps.amax(-1).clamp(min=1e-12)
    several = len(set(found.sites)) > len(set(found.layers))
    starts = np.cumsum([0, *(one.numel() for one in found.pictures)])
    notes = [f"Sinks: {visible(found.sink_rule)}. They are in no map; the weight that they had is said beside it.",
             "Weights are kept in 8 bits after a square root, each map to its own largest."]  # fmt: skip
    if len(order) < heads:
        notes.append(f"Too many weights for one view: of {heads} heads the {len(order)} that read most are kept.")
    spec = ViewSpec(
        kind="grounding",
        title=title,
        caption=caption
        or f"{count(heads, 'head')} at {count(rows, 'position')}, {count(patches, 'patch', 'patches')} of "
        f"{count(len(found.names), 'picture')}: what share of a row's weight is on each.",
        facts={
            "rows": [
                {"position": p, "token": visible(t), "writes": visible(w) if w else ""}
                for p, t, w in zip(found.positions, found.tokens, found.writes, strict=True)
            ],
            "maps": [{"label": f"mean of {count(heads, 'head')}", "layer": None, "head": None, "site": None}]
            + [
                {"label": found.labels[h], "layer": found.layers[h], "head": found.heads[h],
                 "site": visible(found.sites[h]) if several else None}
                for h in order
            ],
            "pictures": [
                {"name": visible(name), "height": int(one.shape[0]), "width": int(one.shape[1]), "start": int(start),
                 "full": size}
                for name, one, start, size in zip(
                    found.names, found.pictures, starts[:-1], found.sizes.tolist(), strict=True
                )
            ],
            "tiles": [
                {"name": visible(name), "picture": picture, "grid": grid}
                for name, picture, grid in zip(found.tile_names, found.tile_pictures, found.grids.tolist(), strict=True)
            ],
            "masses": [visible(name) for name in (found.parts[0], "sinks", *found.parts[1:])],
        },
        blocks={
            "pixels": torch.cat([one.flatten() for one in found.pictures]).numpy(),
            "weights": ((maps / tops[..., None]).sqrt() * 255).round().to(torch.uint8).numpy(),
            "tops": tops.float().numpy(),
            "masses": _masses(found, order),
            "boxes": found.boxes.float().numpy(),
            "tile": np.array(found.tile, dtype=np.int32),
            "cells": found.cells.int().numpy(),
            "positions": found.places.int().numpy(),
            "sinks": sinks.to(torch.uint8).numpy(),
        },
        table=_columns(found),
        notes=tuple(notes),
        provenance=dict(found.provenance),
        inputs=inputs_of([hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in found.pictures]),
    )  # fmt: skip
    return GroundingView(spec, selection)


def _masses(found: Grounding, order: Sequence[int]) -> Array:
    """[row, map, part] what each row's weight lies on, sinks after the first part."""
    gone = found.removed
    whole = torch.stack([found.masses[..., 0] - gone, gone, *found.masses[..., 1:].unbind(-1)], -1)
    return np.asarray(torch.cat([whole.mean(1, keepdim=True), whole[:, order]], 1).float().numpy())


def _columns(found: Grounding) -> dict[str, Any]:
    table = found.table
    text = {name: [visible(str(value)) for value in table[name]] for name in ("token", "head", "tile")}
    return {name: text.get(name, table[name].to_numpy()) for name in table.columns}
