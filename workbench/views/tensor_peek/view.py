"""Tensor peek: shape, statistics, histogram and slices of any tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.capture.site_capture import SiteCapture
from workbench.errors import ReportError
from workbench.views.base import scales
from workbench.views.base.registry import register
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View
from workbench.views.tensor_peek.facts import LARGEST_SIDE, Named, gathered, histogram, slice_of, statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BUDGET = 2 << 20  # bytes of slices on a page


class TensorPeek(View):
    """See `tensor_peek`."""

    def __init__(self, spec: ViewSpec, tensors: Sequence[Named], selection: SharedSelection | None = None) -> None:
        super().__init__(spec, selection)
        self._tensors = tensors
        self.size = (9.0, 3.8)

    def picture(self, figure: Figure) -> None:
        number = self.state.get("tensor", 0)
        number = number if number < len(self._tensors) else 0
        about = self.spec.facts["tensors"][number]
        left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
        if not about["held"]:
            for axes in (left, right):
                axes.set_axis_off()
            left.text(0, 0.5, f"{about['name']} is empty: shape {about['shape']}")
            return
        index, (rows, columns) = self._index(about), self._axes(about)
        cells, (down, across) = slice_of(self._tensors[number].values, index, rows, columns)
        low, high = scales.limits(np.where(np.isfinite(cells), cells, np.nan), signed=about["signed"])
        colours: Any = scales.diverging() if about["signed"] else scales.sequential()
        shape = (cells.shape[1] * across - 0.5, cells.shape[0] * down - 0.5)
        left.set_facecolor(scales.unseen_colour())
        extent = (-0.5, shape[0], shape[1], -0.5)
        drawn = left.imshow(
            np.ma.masked_invalid(cells), cmap=colours, vmin=low, vmax=high, aspect="auto", extent=extent
        )
        figure.colorbar(drawn, ax=left).outline.set_visible(False)
        left.set_xlabel(about["axes"][columns] if columns is not None else "")
        left.set_ylabel(about["axes"][rows] if rows is not None else "")
        left.set_title(_where(about, index, rows, columns))
        if rows is None:
            left.set_yticks([])
        counts, edges = self.spec.blocks[f"counts:{number}"], self.spec.blocks[f"edges:{number}"]
        if len(counts):
            right.bar(edges[:-1], counts, np.diff(edges), align="edge", log=self.state.get("counts") == "log")
        right.set_xlabel("value")
        right.set_ylabel("numbers")
        right.set_title("Histogram of all finite values")

    def _index(self, about: Mapping[str, Any]) -> Sequence[int]:
        """The slice that the state asks for, where the tensor has it."""
        index: Sequence[int] = self.state.get("index") or about["index"]
        inside = len(index) == len(about["shape"]) and all(i < n for i, n in zip(index, about["shape"], strict=True))
        return index if inside else list(about["index"])

    def _axes(self, about: Mapping[str, Any]) -> tuple[int | None, int | None]:
        rows, columns = self.state.get("axes") or about["shown"]
        n = len(about["shape"])
        fits = all(axis is None or axis < n for axis in (rows, columns)) and (rows != columns or rows is None)
        rows, columns = (rows, columns) if fits else about["shown"]
        return rows, columns

    def answer(self, question: Mapping[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        if question.get("ask") != "slice":
            return super().answer(question)
        number, index = question.get("tensor"), question.get("index")
        rows, columns = question.get("rows"), question.get("columns")
        if not isinstance(number, int) or not 0 <= number < len(self._tensors):
            raise ReportError(f"there is no tensor {number!r}")
        named = self._tensors[number]
        shape = tuple(named.values.shape)
        given = index if isinstance(index, list) else []
        inside = all(isinstance(i, int) and 0 <= i < n for i, n in zip(given, shape, strict=False))
        if not isinstance(index, list) or len(index) != len(shape) or not inside:
            raise ReportError(f"there is no slice {index!r}", shape=shape)
        shown = [axis for axis in (rows, columns) if axis is not None]
        if any(not isinstance(axis, int) or not 0 <= axis < len(shape) for axis in shown) or len({*shown}) < len(shown):
            raise ReportError(f"axes {rows!r} and {columns!r} cannot be shown", shape=shape)
        cells, pooled = slice_of(named.values, index, rows, columns)
        data = np.ascontiguousarray(cells, dtype="<f8").tobytes()
        return {"shape": list(cells.shape), "pooled": list(pooled)}, [data]


def _where(about: Mapping[str, Any], index: Sequence[int], rows: int | None, columns: int | None) -> str:
    pairs = enumerate(zip(about["axes"], index, strict=True))
    fixed = [f"{name} {at}" for axis, (name, at) in pairs if axis not in (rows, columns)]
    return ", ".join([about["name"], *fixed])


def tensor_peek(
    tensor: Any,
    names: Sequence[str] | None = None,
    *,
    title: str = "",
    caption: str = "",
    budget: int = _BUDGET,
    provenance: Mapping[str, Any] | None = None,
    selection: SharedSelection | None = None,
) -> TensorPeek:
    """What a tensor holds.

    In a notebook any slice can be asked for; a page holds the first slices of each tensor.

    Args:
        tensor: a tensor, an array, {name: tensor}, or a site capture (its statistics, z and weights).
        names: names of the axes. Those named "layer", "head", "query", "key" and "token" take part in the selection.
        budget: bytes of slices that a page may hold, at least one slice per tensor; tiles are float64, deflated.

    Raises:
        ReportError: no numbers, a tensor on the meta device, a sparse or quantized one, names that do not fit.

    >>> tensor_peek(torch.eye(3)).data()[["name", "shape", "dtype", "maximum", "zeros"]]
         name  shape    dtype  maximum  zeros
    0  tensor  3 × 3  float32      1.0    6.0
    """
    tensors = gathered(tensor, names)
    blocks: dict[str, Any] = {}
    facts = []
    rows = []
    notes = []
    for i, named in enumerate(tensors):
        about, found, note = _described(i, named, blocks, budget // len(tensors))
        facts.append(about)
        rows.append(found)
        notes += note
    first = tensors[0]
    if not title:
        site = f" of {tensor.site.name}" if isinstance(tensor, SiteCapture) else ""
        title = (f"Tensors{site}" if site else first.name.capitalize()) + ("" if site else f" {_shape(first)}")
    spec = ViewSpec(
        kind="tensor_peek",
        title=title,
        caption=caption or f"{_count(tensors)}, {first.dtype} on {first.device}: statistics, histogram, slices.",
        facts={"tensors": facts},
        blocks=blocks,
        table={
            "name": [named.name for named in tensors],
            "shape": [_shape(named) for named in tensors],
            "dtype": [named.dtype for named in tensors],
            "device": [named.device for named in tensors],
            **{key: np.asarray([row[key] for row in rows]) for key in rows[0]},
        },
        notes=tuple(notes),
        provenance=provenance or {},
    )
    return TensorPeek(spec, tensors, selection)


def _count(tensors: Sequence[Named]) -> str:
    return f"{tensors[0].values.numel():,} numbers" if len(tensors) == 1 else f"{len(tensors)} tensors"


def _shape(named: Named) -> str:
    return " × ".join(str(n) for n in named.values.shape) or "one number"


def _described(
    i: int, named: Named, blocks: dict[str, Any], budget: int
) -> tuple[dict[str, Any], dict[str, float], list[str]]:
    values = named.values
    found = statistics(values)
    counts, edges = histogram(values, found["minimum"], found["maximum"])
    blocks[f"counts:{i}"], blocks[f"edges:{i}"] = counts, edges
    n = values.dim()
    shown = (n - 2, n - 1) if n >= 2 else (None, n - 1 if n else None)
    leading = tuple(values.shape[:-2]) if n >= 2 else ()
    total = int(np.prod(leading, dtype=np.int64))
    notes: list[str] = []
    index = [0] * n
    pooled = (1, 1)
    slices = []
    if values.numel():
        for number in range(total):
            at = [int(k) for k in np.unravel_index(number, leading)] if leading else []
            cells, pooled = slice_of(values, [*at, *[0] * (n - len(at))], *shown)
            slices.append(cells)
            if (number + 2) * cells.size * 8 > budget:
                break
        if len(slices) < total:
            notes.append(
                f"Without a kernel, the first {len(slices):,} of {total:,} slices of {named.name} can be shown."
            )
        if pooled != (1, 1):
            notes.append(
                f"A slice of {named.name} has at most {LARGEST_SIDE} cells on a side: each is the value farthest "
                f"from 0 of {pooled[0]} × {pooled[1]}."
            )
    else:
        notes.append(f"{named.name} is empty.")
    if values.numel() > 1 << 22:
        notes.append(f"Quantiles of {named.name} are those of every {-(-values.numel() // (1 << 22))}th number.")
    if not values.is_floating_point() and values.numel() and max(abs(found["minimum"]), abs(found["maximum"])) > 2**53:
        notes.append(f"{named.name} holds whole numbers beyond 2⁵³, which are shown rounded.")
    bad = int(found["NaN"] + found["∞"] + found["minus ∞"])
    if bad:
        said = f"{bad:,} number{'s' * (bad > 1)} of {named.name}"
        notes.append(f"{said} NaN or infinite: grey, and left out of mean, deviation and quantiles.")
    blocks[f"slices:{i}"] = np.stack(slices) if slices else np.zeros((0, 0, 0))
    about = {
        "name": named.name,
        "shape": list(values.shape),
        "dtype": named.dtype,
        "device": named.device,
        "axes": list(named.axes),
        "shown": list(shown),
        "index": index,
        "pooled": list(pooled),
        "held": len(slices),
        "signed": bool(found["minimum"] < 0),
        "statistics": found,
    }
    return about, found, notes


register(torch.Tensor, tensor_peek)
register(np.ndarray, tensor_peek)
