"""Windows of an image put together: one map over all of its patches, and where the windows meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import isqrt
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from workbench.errors import ReportError
from workbench.kernels.grouped import GroupedPattern
from workbench.kernels.patterns import Pattern

if TYPE_CHECKING:
    from workbench.capture.site_capture import SiteCapture

_NOTHING = 1e-20  # a weight that a mask of −100 leaves


@dataclass(frozen=True)
class Windows:
    """How windows lie over the patches of an image, row by row.

    Attributes:
        grid: rows and columns of patches, without what fills up the last windows; None: windows make a square image.
        window: patches along an edge; None: the queries of a window are a square.
        shift: patches, down and to the right, by which windows begin later, as every other block of Swin has them; None
            for what the windows at the border hide.
    """

    grid: tuple[int, int] | None = None
    window: int | None = None
    shift: int | tuple[int, int] | None = None


class Placed(NamedTuple):
    """Windows over an image.

    Attributes:
        pattern: [image, head, patch, patch]. grid: rows and columns of patches.
        seams: rows before which windows meet, and columns.
    """

    pattern: Pattern
    grid: tuple[int, int]
    seams: tuple[list[int], list[int]]


def place(one: SiteCapture, windows: Windows) -> Placed:
    """The map of a site over the whole image: of windows, of windows with a halo, and of one that is whole already.

    Raises:
        ReportError: windows that are not those of the site, named with both numbers.
    """
    site, (b, _, n_queries, n_keys) = one.site, one.shape
    if site.kind not in ("window", "halo"):
        return _whole(one, windows)
    edge = _root(n_queries, "queries", site.name) if windows.window is None else windows.window
    reach = _root(n_keys, "keys", site.name)
    if edge**2 != n_queries or (reach - edge) % 2 or reach < edge:
        raise ReportError(
            f"{site.name}: windows of {edge} × {edge} patches do not have {n_queries} queries and {n_keys} keys",
            hint="leave out window=, or give the edge of the site's windows",
        )
    rows, columns = _grid(windows.grid, site.windows, edge, site.name)
    down, across = -(-rows // edge), -(-columns // edge)
    if down * across != site.windows or b % site.windows:
        raise ReportError(
            f"{site.name}: {rows} × {columns} patches are {down * across} windows of {edge}, and it has {site.windows}",
            hint="give grid=(rows, columns) of the patches at this depth",
        )
    weights = one.pattern.dense().unflatten(0, (-1, site.windows)).transpose(1, 2)  # [image, head, window, …]
    halo = (reach - edge) // 2
    sides = (down * edge, across * edge)
    shift = (0, 0) if halo else _shift(weights, sides, edge, windows.shift, site.name)
    queries = _positions((rows, columns), sides, edge, 0, shift)
    keys = _positions((rows, columns), sides, edge, halo, shift)
    n = rows * columns
    pattern = GroupedPattern(weights, queries[None, None], keys[None, None], n, n, normalised=False)
    seams = [_seams(n, side, edge, by) for n, side, by in zip((rows, columns), sides, shift, strict=True)]
    return Placed(pattern, (rows, columns), (seams[0], seams[1]))


def _whole(one: SiteCapture, windows: Windows) -> Placed:
    n = one.shape[3]
    grid = windows.grid or (isqrt(n), isqrt(n))
    if one.shape[2] != n or grid[0] * grid[1] != n:
        raise ReportError(f"{one.site.name}: {n} keys are no {grid[0]} × {grid[1]} patches", hint="give grid=")
    if windows.window is None:
        raise ReportError(
            f"{one.site.name} has one map over all patches, which does not show its windows", hint="give window="
        )
    by = windows.shift if isinstance(windows.shift, tuple) else (windows.shift or 0,) * 2
    seams = [
        _seams(n, -(-n // windows.window) * windows.window, windows.window, s) for n, s in zip(grid, by, strict=True)
    ]
    return Placed(one.pattern, grid, (seams[0], seams[1]))


def _root(n: int, what: str, site: str) -> int:
    if isqrt(n) ** 2 != n:
        raise ReportError(f"{site}: {n} {what} are no square window", hint="only square windows can be laid out")
    return isqrt(n)


def _grid(grid: tuple[int, int] | None, n_windows: int, edge: int, site: str) -> tuple[int, int]:
    if grid is not None:
        return grid
    if isqrt(n_windows) ** 2 != n_windows:
        raise ReportError(
            f"{site}: {n_windows} windows are no square image", hint="give grid=(rows, columns) of its patches"
        )
    return (isqrt(n_windows) * edge,) * 2


def _seams(n: int, side: int, edge: int, shift: int) -> list[int]:
    return sorted({at for start in range(0, side, edge) if 0 < (at := (start + shift) % side) < n})


def _positions(grid: tuple[int, int], sides: tuple[int, int], edge: int, halo: int, shift: tuple[int, int]) -> Tensor:
    """[window, place] the patch at each place of each window, row-major; −1 for none."""
    lines = []
    for n, side, by in zip(grid, sides, shift, strict=True):
        at = torch.arange(0, side, edge)[:, None] + torch.arange(edge + 2 * halo) - halo
        at = (at + by) % side if not halo else at
        lines.append(at.where((at >= 0) & (at < n), -1))
    y, x = lines[0][:, None, :, None], lines[1][None, :, None, :]
    return (y * grid[1] + x).where((y >= 0) & (x >= 0), -1).flatten(2).flatten(0, 1)


def _shift(
    weights: Tensor, sides: tuple[int, int], edge: int, given: int | tuple[int, int] | None, site: str
) -> tuple[int, int]:
    """By how much windows begin later: what was far apart before the image was rolled does not see each other."""
    seen = (weights.amax((0, 1)) > _NOTHING).cpu()  # [window, query, key]
    if given is not None:
        by = (given, given) if isinstance(given, int) else given
        if not torch.equal(seen, _together(sides, edge, by)):
            raise ReportError(
                f"{site}: windows that are shifted by {by[0]} and {by[1]} hide other keys than these do",
                hint="leave out shift=, or give that of this layer",
            )
        return by
    steps: Sequence[Sequence[int]] = [range(edge) if side > edge else [0] for side in sides]
    for down, across in product(*steps):
        if torch.equal(seen, _together(sides, edge, (down, across))):
            return down, across
    raise ReportError(
        f"{site}: its windows hide keys that no shift hides", hint="a mask of another kind cannot be laid out"
    )


def _together(sides: tuple[int, int], edge: int, shift: tuple[int, int]) -> Tensor:
    """[window, query, key] whether patches of a window were neighbors before the image was rolled."""
    lines = []
    for side, by in zip(sides, shift, strict=True):
        lines.append((torch.arange(side) >= side - by).unflatten(0, (-1, edge)))  # what came around the border
    y, x = lines[0][:, None, :, None], lines[1][None, :, None, :]
    region = (2 * y.int() + x.int()).flatten(2).flatten(0, 1)
    return region[:, :, None] == region[:, None]
