"""Facts of any tensor: what it holds, statistics, a histogram, one slice of it made small enough to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.capture.site_capture import SiteCapture
from workbench.errors import CaptureError, ReportError
from workbench.kernels.statistics import STATISTICS, VALUE_WEIGHTED, output_names
from workbench.views.base.spec import Array

LARGEST_SIDE = 512
"""Cells on a side of a tile; a longer side is pooled."""
BINS = 64
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
_CHUNK = 1 << 22  # numbers that are turned into float64 at a time
_FOR_QUANTILES = 1 << 22  # numbers that quantiles are computed from; of a larger tensor, every n-th
_ENDS = {"query": ["query"], "key": ["key"], "query top": ["query", "top"], "block": ["query block", "key block"]}


@dataclass(frozen=True)
class Named:
    """A tensor with a name and names of its axes."""

    name: str
    values: Tensor
    axes: tuple[str, ...]
    dtype: str
    device: str


def gathered(thing: Any, names: Sequence[str] | None) -> list[Named]:
    """The tensors of a tensor, an array, numbers, {name: tensor}, or a site capture.

    Raises:
        ReportError: nothing there, no tensor, a tensor without values, or another number of names than of axes.
    """
    if isinstance(thing, SiteCapture):
        held = _of_site(thing)
    elif isinstance(thing, Mapping):
        held = [(str(name), _tensor(value, str(name)), names) for name, value in thing.items()]
    else:
        held = [("tensor", _tensor(thing, "this"), names)]
    if not held:
        raise ReportError("there is no tensor to show")
    return [named for name, tensor, axes in held for named in _parts(name, tensor, axes)]


def _of_site(capture: SiteCapture) -> list[tuple[str, Tensor, Sequence[str] | None]]:
    axes = {out: ("batch", "head", *_ENDS[s.axes]) for name, s in STATISTICS.items() for out in output_names(name)}
    held: list[tuple[str, Tensor, Sequence[str] | None]] = []
    for name, tensor in capture.statistics.items():
        found = axes.get(name.removeprefix(VALUE_WEIGHTED), ())
        held.append((name, tensor, found if len(found) == tensor.dim() else None))
    for name, known in (("z", ("batch", "query", "head", "d_head")), ("weights", ("batch", "head", "query", "key"))):
        tensor = getattr(capture, name)
        if tensor is not None:
            held.append((name, tensor, known))
    if not held:
        raise CaptureError("the site holds no tensors", site=capture.site.name, hint="capture statistics, or z=True")
    return held


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value.detach()
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "biufc":
            raise ReportError(f"{name} is a {type(value).__name__}, which holds no numbers", shape=array.shape)
        known = array.astype(array.dtype.newbyteorder("="))
        if known.dtype.itemsize > 8 and known.dtype.kind == "f":
            known = known.astype(np.float64)
        tensor = torch.from_numpy(np.ascontiguousarray(known).reshape(array.shape))
    if tensor.device.type == "meta":
        raise ReportError(f"{name} is on the meta device and has no values", shape=tuple(tensor.shape))
    if tensor.layout != torch.strided or tensor.is_nested:
        raise ReportError(f"{name} is {tensor.layout}", hint="pass tensor.to_dense()", shape=tuple(tensor.shape))
    if tensor.is_quantized:
        raise ReportError(f"{name} is quantized", hint="pass tensor.dequantize()", shape=tuple(tensor.shape))
    return tensor


def _parts(name: str, tensor: Tensor, axes: Sequence[str] | None) -> list[Named]:
    """A tensor; a complex one as size, real and imaginary part."""
    if axes is not None and len(axes) != tensor.dim():
        raise ReportError(f"{name} has {tensor.dim()} axes, not {len(axes)}", shape=tuple(tensor.shape))
    known = tuple(axes) if axes is not None else tuple(f"axis {i}" for i in range(tensor.dim()))
    about = (known, str(tensor.dtype).removeprefix("torch."), str(tensor.device))
    if not tensor.is_complex():
        return [Named(name, tensor, *about)]
    tensor = tensor.resolve_conj()
    views = {f"|{name}|": tensor.abs(), f"Re {name}": tensor.real, f"Im {name}": tensor.imag}
    return [Named(each, values, *about) for each, values in views.items()]


def _chunks(tensor: Tensor) -> Iterator[Array]:
    """All numbers as float64, a part at a time."""
    for part in tensor.reshape(-1).split(_CHUNK):
        yield _double(part)


def _double(tensor: Tensor) -> Array:
    """float64 numbers; float8 goes through float32."""
    small = tensor.is_floating_point() and tensor.element_size() == 1
    found: Array = (tensor.float() if small else tensor).to("cpu", torch.float64).numpy()
    return found


def statistics(tensor: Tensor) -> dict[str, float]:
    """Counts, and minimum, maximum, mean, standard deviation (of the population) and quantiles of the finite values.

    Quantiles of more than 4 million numbers are those of every n-th.
    """
    counts = {"numbers": float(tensor.numel()), "NaN": 0.0, "∞": 0.0, "minus ∞": 0.0, "zeros": 0.0}
    low, high, total, square, n = np.inf, -np.inf, 0.0, 0.0, 0
    for values in _chunks(tensor):
        counts["NaN"] += float(np.isnan(values).sum())
        counts["∞"] += float(np.isposinf(values).sum())
        counts["minus ∞"] += float(np.isneginf(values).sum())
        counts["zeros"] += float((values == 0).sum())
        known = values[np.isfinite(values)]
        if known.size:
            low, high = min(low, float(known.min())), max(high, float(known.max()))
            total, n = total + float(known.sum()), n + known.size
    mean = total / n if n else np.nan
    for values in _chunks(tensor):
        known = values[np.isfinite(values)]
        square += float(((known - mean) ** 2).sum())
    found = {
        "minimum": low if n else np.nan,
        "maximum": high if n else np.nan,
        "mean": mean,
        "standard deviation": float(np.sqrt(square / n)) if n else np.nan,
    }
    every = max(1, -(-tensor.numel() // _FOR_QUANTILES))
    some = _double(tensor.reshape(-1)[::every])
    some = some[np.isfinite(some)]
    levels = np.quantile(some, QUANTILES) if some.size else [np.nan] * len(QUANTILES)
    found |= {f"{100 * q:g} %": float(level) for q, level in zip(QUANTILES, levels, strict=True)}
    zeros = counts["zeros"] / tensor.numel() if tensor.numel() else np.nan
    return counts | found | {"share of zeros": zeros}


def histogram(tensor: Tensor, low: float, high: float) -> tuple[Array, Array]:
    """Counts [bin] and edges [bin + 1] of the finite values, which lie between `low` and `high`."""
    if not tensor.numel() or not np.isfinite([low, high]).all():
        return np.zeros(0), np.zeros(0)
    if low == high:
        width = abs(low) * 1e-3 or 0.5
        low, high = low - width, high + width
    edges = np.linspace(low, high, BINS + 1)
    counts = np.zeros(BINS)
    for values in _chunks(tensor):
        counts += np.histogram(values[np.isfinite(values)], bins=edges)[0]
    return counts, edges


def slice_of(
    tensor: Tensor, index: Sequence[int], rows: int | None, columns: int | None
) -> tuple[Array, tuple[int, int]]:
    """A slice as [row, column], and how many rows and columns each of its cells stands for.

    A cell that stands for several numbers is the one that is farthest from 0; infinite ones count, NaN only where there
    is nothing else.

    Args:
        index: one position per axis; those of the shown axes do not matter.
        rows, columns: the axes that are shown; None for one row.
    """
    picked: list[Any] = [slice(None) if axis in (rows, columns) else at for axis, at in enumerate(index)]
    part = tensor[tuple(picked)]
    if rows is not None and columns is not None and rows > columns:
        part = part.T
    flat = _double(part.reshape(1, -1) if rows is None or columns is None else part)
    factors = tuple(max(1, -(-side // LARGEST_SIDE)) for side in flat.shape)
    return _pooled(flat, *factors), (factors[0], factors[1])


def _pooled(values: Array, down: int, across: int) -> Array:
    if down == across == 1:
        return values
    height, width = -(-values.shape[0] // down), -(-values.shape[1] // across)
    padded = np.full((height * down, width * across), np.nan)
    padded[: values.shape[0], : values.shape[1]] = values
    blocks = padded.reshape(height, down, width, across).transpose(0, 2, 1, 3).reshape(height, width, -1)
    sizes = np.where(np.isnan(blocks), -1.0, np.abs(blocks))
    best: Array = np.take_along_axis(blocks, sizes.argmax(-1)[..., None], -1)[..., 0]
    return best
