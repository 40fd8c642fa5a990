"""What a model and its metrics gave in a sweep: whether two outputs are the same, and whether numbers are usable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.hooks.nested import tensors

_CLOSE = 1e-3  # largest relative difference that repeating the batch may make


def same(a: Any, b: Any) -> bool:
    """Whether two outputs are equal to the bit."""
    pairs = list(zip(tensors(a), tensors(b), strict=False))
    equal = len(tensors(a)) == len(tensors(b)) > 0
    return equal and all(x.shape == y.shape and _bits_equal(x, y) for x, y in pairs)


def _bits_equal(x: Tensor, y: Tensor) -> bool:
    return bool(((x == y) | ((x != x) & (y != y))).all())


def close(whole: Any, part: Any) -> bool:
    """Whether an output is that of a part of a repeated batch, up to rounding; single numbers are left out of it."""
    mine, other = [t for t in tensors(whole) if t.dim()], [t for t in tensors(part) if t.dim()]
    if len(mine) != len(other) or not mine:
        return False
    for x, y in zip(mine, other, strict=True):
        if x.shape != y.shape:
            return False
        if not x.is_floating_point():
            continue
        limit = _CLOSE * float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0
        off = (x - y).abs()
        if float(off[off.isfinite()].max() if bool(off.isfinite().any()) else 0.0) > limit:
            return False
    return True


def check_value(value: Any, name: str, of: str, rows: slice) -> Tensor:
    """A metric's numbers, if they are one finite number per example.

    Raises:
        WorkbenchError: they are not.
    """
    size = rows.stop - rows.start
    if not isinstance(value, Tensor) or value.shape != (size,) or value.is_complex():
        shape = value.shape if isinstance(value, Tensor) else None
        raise WorkbenchError(
            f'the metric "{name}" gave {type(value).__name__ if shape is None else list(shape)}, '
            f"expected one real number for each of the {size} examples",
            shape=shape,
        )
    found = value.detach().to("cpu", torch.float64)
    bad = (~found.isfinite()).nonzero()
    if bad.numel():
        which = int(bad[0])
        raise WorkbenchError(
            f'the metric "{name}" is {float(found[which])} on example {rows.start + which} for {of}',
            hint="does the edited model overflow, or the metric divide by zero?",
        )
    return found
