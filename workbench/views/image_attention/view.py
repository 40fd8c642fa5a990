"""Image attention: what heads look at, laid over the images: all heads on one image, one head on all images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workbench.analysis.profile.measuring import choose_sites, labels_of, locate
from workbench.analysis.profile.places import Places
from workbench.capture.capture import Capture
from workbench.counting import count
from workbench.errors import ReportError, expect
from workbench.tokens import visible
from workbench.views.base import scales
from workbench.views.base.selection import Selection, SharedSelection, inputs_of
from workbench.views.base.spec import Array, ViewSpec
from workbench.views.base.view import View
from workbench.views.head_atlas.leading import leading
from workbench.views.image_attention.windows import Placed, Windows, place

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from workbench.hooks.sites import Site
    from workbench.kernels.patterns import Pattern

CELLS = 3_000_000
"""Weights that a view holds; with more, only those of the prefix tokens are kept."""
_SIDE = 224  # pixels that an image keeps at most
_PICTURED = 8  # images of the still picture


class ImageAttention(View):
    """See `image_attention`."""

    def picture(self, figure: Figure) -> None:
        facts, pixels = self.spec.facts, self.spec.blocks["pixels"]
        chosen, state = self.chosen, self.state
        heads = facts["heads"]
        at = next(
            (
                i
                for one in (chosen, Selection.of(self.spec.selection))
                for i, each in enumerate(heads)
                if one.heads[:1] == (each["head"],) and one.has(each["layer"], each["head"], each["site"])
            ),
            facts["first"],
        )
        start = 0 if chosen.example is None or chosen.example >= len(pixels) else chosen.example
        start = max(0, min(start, len(pixels) - _PICTURED))  # the chosen image is among those that are pictured
        shown = range(start, min(len(pixels), start + _PICTURED))
        maps = [self._map(i, at) for i in shown]
        top = max(float(each.max()) for each in maps) if state.get("shared") else None
        figure.set_size_inches(max(3.2, 1.15 * len(shown)), 2.9)
        panels = figure.subplots(2, len(shown), squeeze=False)
        for column, i in enumerate(shown):
            for panel in panels[:, column]:
                panel.set_axis_off()
            image = pixels[i] if pixels.shape[-1] == 3 else pixels[i, ..., 0]
            height, width = image.shape[:2]
            panels[0, column].imshow(image, cmap="gray", vmin=0, vmax=255)
            panels[0, column].set_title(facts["images"][i], fontsize=8)
            panels[1, column].imshow(maps[column], extent=(0, width, height, 0), vmin=0, vmax=top)
            for lines, draw, of in zip(heads[at].get("seams") or ((), ()), ("axhline", "axvline"), (0, 1), strict=True):
                for line in lines:
                    getattr(panels[1, column], draw)(line * (height, width)[of] / facts["grid"][of], color="w", lw=0.6)
            if i == chosen.example:
                panels[0, column].add_patch(scales.frame_of(0, 0, width, height))
        each = "all to the largest of them" if state.get("shared") else "each to its own largest"
        figure.supxlabel(f"{heads[at]['label']}: weight from {self._source()[1]}, {each}", fontsize=9)

    def _source(self) -> tuple[int | None, str]:
        """The query whose weights are shown, None for what patches receive, and what to call it."""
        facts, query = self.spec.facts, self.chosen.query
        prefix, columns = facts["prefix"], facts["grid"][1]
        if query is not None and query < prefix:
            return 0, "CLS"
        if query is not None and facts["every"] and query < prefix + math.prod(facts["grid"]):
            row, column = divmod(query - prefix, columns)
            return query, f"the patch in row {row}, column {column}"
        return (0, "CLS") if prefix and not self.state.get("received") else (None, "all patches, received")

    def _map(self, image: int, head: int) -> Array:
        """[row, column] from the chosen source."""
        facts, query = self.spec.facts, self._source()[0]
        if query is None:
            weights = self.spec.blocks["received"][image, head].astype(np.float64)
        else:
            weights = (self.spec.blocks["weights"][image, head, query].astype(np.float64) / 255) ** 2
        return np.asarray(weights[facts["prefix"] :].reshape(facts["grid"]))


def image_attention(
    cap: Capture,
    images: Any,
    *,
    labels: Sequence[Any] | None = None,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
    windows: Windows | None = None,
    sites: Sequence[Any] | None = None,
    title: str = "Attention over images",
    caption: str | None = None,
    selection: SharedSelection | None = None,
) -> ImageAttention:
    """Attention laid over the images that it was captured on.

    All heads are shown on the chosen image, and the chosen head on all images: from CLS, from the chosen patch, or what
    each patch receives from all others on average. The image, the head and the patch are part of the shared selection
    (`example`, `layer` and `heads`, `query`).

    Args:
        cap: any number of forwards; patterns must have been kept (queries_keys=True).
        images: what the model was given, in the order of forwards and batch rows: [image, channel, row, column] with
            one or three channels, in any range, or [image, row, column].
        labels: of the images, such as what they show.
        grid, prefix, sites: as `workbench.attention_profile` takes them.
        windows: how the windows of windowed attention lie over the patches; they are put together to one map for each
            image, and lines show where they meet. Sites of another depth, whose grid is another, are left out.

    Raises:
        ReportError: images that are none, or not as many as the capture has; windows that are not those of the sites.
        CaptureError, WorkbenchError: as `attention_profile`.

    >>> import workbench
    >>> from workbench.models import examples, load
    >>> model, _ = load("demo-vit")
    >>> pixels = examples().pixel_values[:2]
    >>> with workbench.attach(model) as wb, torch.no_grad(), wb.capture() as cap:
    ...     _ = model(pixel_values=pixels)
    >>> view = image_attention(cap, pixels)
    >>> len(view.spec.facts["heads"]), view.spec.facts["grid"]
    (16, [8, 8])
    """
    expect(Capture, cap=cap)
    left_out = 0
    if windows is None:
        chosen, _ = choose_sites(cap, sites)
        places = locate(cap, chosen, grid, prefix)
        if places.text:
            raise ReportError("the model tells of no patches", hint="give grid=(rows, columns)")
        maps = [{site: call[site].pattern for site in chosen} for call in cap.calls]
        seams: dict[Site, tuple[list[int], list[int]]] = {}
    else:
        if grid is not None or prefix is not None:
            raise ReportError("windows tell where patches are", hint="give windows=Windows(grid=(rows, columns))")
        placed, left_out = _placed(cap, sites, windows)
        chosen, first = list(placed[0]), next(iter(placed[0].values()))
        places = Places(*first.grid)
        maps = [{site: one.pattern for site, one in call.items()} for call in placed]
        seams = {site: one.seams for site, one in placed[0].items()}
    pixels = _bytes(images)
    n = sum(of[chosen[0]].n_batch for of in maps)
    if len(pixels) != n:
        raise ReportError(f"the capture holds {n} images, not {len(pixels)}", shape=pixels.shape)
    if labels is not None and len(labels) != n:
        raise ReportError(f"there are {n} images and {len(labels)} labels")
    n_heads = sum(cap.calls[0][site].shape[1] for site in chosen)
    every = n * n_heads * places.length**2 <= CELLS
    if not every and n * n_heads * max(1, places.prefix) * places.length > CELLS:
        raise ReportError(
            f"{n} images, {n_heads} heads and {places.length} tokens are too much for one view",
            hint="capture fewer images, or choose layers with sites=",
        )
    rows = slice(0, places.length if every else places.prefix)
    weights, received, largest = _weights(maps, places, rows)
    heads = [(site, h) for site in chosen for h in range(cap.calls[0][site].shape[1])]
    named = [visible(str(label)) for label in (range(n) if labels is None else labels)]
    several = len({site.layer for site, _ in heads}) < len(chosen)
    begins = leading(cap, heads) if windows is None else None  # statistics are those of windows
    notes = ["Weights are kept in 8 bits after a square root: the error is at most 0.004."]
    if left_out:
        others = "1 site of another grid is" if left_out == 1 else f"{left_out} sites of other grids are"
        notes.append(f"{others} left out: choose some with sites=.")
    if not every:
        notes.append("Too many weights for one view: only those from the tokens before the patches are kept.")
    spec = ViewSpec(
        kind="image_attention",
        title=title,
        caption=caption
        or f"{count(len(heads), 'head')} on {count(n, 'image')} of {places.rows} x {places.columns} patches: weights "
        f"of each query over all keys, of which those on patches are drawn."
        + ("" if windows is None else " Lines are where windows meet.")
        + ("" if begins is None else f" {begins.why}"),
        facts={
            "grid": [places.rows, places.columns],
            "prefix": places.prefix,
            "every": every,
            "images": named,
            "heads": [
                {"label": label, "layer": site.layer, "head": h, "site": visible(site.name) if several else None}
                | ({"seams": [list(lines) for lines in seams[site]]} if seams else {})
                for label, (site, h) in zip(labels_of(heads), heads, strict=True)
            ],
            "first": len(heads) - cap.calls[0][chosen[-1]].shape[1],  # of the last layer, unless statistics tell
        },
        blocks={"pixels": pixels, "weights": weights, "received": received},
        table={
            "image": [name for name in named for _ in heads],
            "head": [label for _ in named for label in labels_of(heads)],
            **{f"largest {name}": values.ravel() for name, values in largest.items()},
        },
        notes=tuple(notes),
        selection={} if begins is None else begins.selection,
        provenance=dict(cap.provenance),
        inputs=inputs_of([hashlib.sha256(image).hexdigest() for image in pixels]),
    )
    return ImageAttention(spec, selection)


def _bytes(images: Any) -> Array:
    """[image, row, column, channel] from 0 to 255, one range for all."""
    found = images.detach().cpu() if isinstance(images, Tensor) else torch.as_tensor(np.asarray(images))
    found = found.double()
    found = found[:, None] if found.dim() == 3 else found
    if found.dim() != 4 or found.numel() == 0 or found.shape[1] not in (1, 3):
        raise ReportError("images are [image, channel, row, column] with one or three channels", shape=found.shape)
    if not bool(found.isfinite().all()):
        raise ReportError("images hold a value that is not finite")
    larger = max(found.shape[-2:]) / _SIDE
    if larger > 1:
        size = [max(1, round(side / larger)) for side in found.shape[-2:]]
        found = torch.nn.functional.interpolate(found, size, mode="area")
    low, high = found.min(), found.max()
    scaled = (found - low) / (high - low).clamp(min=1e-12)
    return np.ascontiguousarray((scaled * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def _placed(cap: Capture, sites: Sequence[Any] | None, windows: Windows) -> tuple[list[dict[Site, Placed]], int]:
    """The sites of each forward with their windows put together, of one grid; and how many have another."""
    if sites is None:
        chosen = [site for site in cap.sites if site.kind in ("window", "halo")]
    else:
        chosen = [cap.sites[s if isinstance(s, (str, int)) else s.name] for s in sites]
    if not chosen:
        raise ReportError("the capture has no windows", hint="choose sites whose maps are of the whole image: sites=")
    first = place(cap.calls[0][chosen[0]], windows)
    fitting = [chosen[0]]
    for site in chosen[1:]:
        try:
            same = place(cap.calls[0][site], windows).grid == first.grid
        except ReportError:
            if sites is not None:
                raise
            same = False
        if not same and sites is not None:
            raise ReportError(f"{site.name} has another grid than {chosen[0].name}", hint="choose sites of one depth")
        fitting += [site] if same else []
    return [{site: place(call[site], windows) for site in fitting} for call in cap.calls], len(chosen) - len(fitting)


def _weights(
    maps: Sequence[Mapping[Site, Pattern]], places: Places, rows: slice
) -> tuple[Array, Array, dict[str, Array]]:
    """√ weights [image, head, row, key] in 8 bits, mean weight that keys receive from patches [image, head, key].

    Args:
        maps: of each forward, by site.
    """
    weights, received, largest = [], [], []
    for call in maps:
        kept, got = [], []
        for pattern in call.values():
            dense = (pattern.magnitude() if pattern.by_magnitude else pattern).dense().detach().float().cpu()
            kept.append(dense[:, :, rows].clamp(min=0).sqrt())
            got.append(dense[:, :, places.prefix :].mean(2))
        weights.append((torch.cat(kept, 1) * 255).round().to(torch.uint8))
        received.append(torch.cat(got, 1))
        largest.append(weights[-1][:, :, : max(1, places.prefix)])
    whole, by_key = torch.cat(weights).numpy(), torch.cat(received)
    found = {"received": by_key[..., places.prefix :].amax(-1).double().numpy()}
    if places.prefix:
        top = torch.cat(largest)[:, :, 0, places.prefix :].amax(-1)
        found = {"from CLS": ((top.double() / 255) ** 2).numpy()} | found
    return whole, by_key.numpy(), found
