"""`gate_profile`: how large each gate's factors are, where, and how much of that the input decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.capture.capture import Capture
from workbench.errors import CaptureError, expect
from workbench.hooks.sites import Site
from workbench.storage.result import Result
from workbench.storage.typed import Between, Keys

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class GateProfile(Result):
    """Factors of every head of every gate, over examples and positions. Rows are heads, in the order of the sites.

    Attributes:
        sites, layers, heads: of each row, its site's name, layer and head.
        mean, low, high: [row] of the factor. negative: [row] share of factors below 0.
        by_input: [row] standard deviation over examples at a position, root mean square over positions; zero of a gate
            that is the same for every input.
        by_position: [row] standard deviation over positions of the mean over examples; zero where all positions have
            the same. Squares of both add up to the variance of all factors.
        gates: names of the sites. maps: by site, [position] mean over examples and heads. grids: by site, rows and
            columns that its positions are; (1, positions) of none.
        n_examples: examples, batch rows of all forwards.
        provenance: of the capture.
    """

    form = "workbench.gate_profile"
    filled = ("row",)

    sites: Annotated[tuple[str, ...], "row"]
    layers: Annotated[tuple[int, ...], "row"]
    heads: Annotated[tuple[int, ...], "row"]
    mean: Float[Tensor, " row"]
    low: Float[Tensor, " row"]
    high: Float[Tensor, " row"]
    negative: Float[Tensor, " row"]
    by_input: Float[Tensor, " row"]
    by_position: Float[Tensor, " row"]
    gates: tuple[str, ...]
    maps: Annotated[dict[str, Float[Tensor, " _"]], Keys("gates")]
    grids: Annotated[dict[str, tuple[int, int]], Keys("gates")]
    n_examples: Annotated[int, Between(1)]
    provenance: dict[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        """One row per head of a gate."""
        import pandas as pd

        columns: dict[str, Any] = {"site": self.sites, "layer": self.layers, "head": self.heads}
        for name in ("mean", "low", "high", "negative", "by_input", "by_position"):
            columns[name] = getattr(self, name).double().numpy()
        return pd.DataFrame(columns)

    def check_parts(self) -> None:
        """Positions are those of the grids."""
        for name in self.gates:
            rows, columns = self.grids[name]
            if min(rows, columns) < 1 or rows * columns != len(self.maps[name]):
                raise CaptureError(f"{len(self.maps[name])} positions are no grid of {rows} × {columns}", site=name)

    def __repr__(self) -> str:
        return f"GateProfile({len(self.sites)} heads of {len(self.gates)} gates, {self.n_examples} examples)"


def gate_profile(cap: Capture, grid: tuple[int, int] | None = None) -> GateProfile:
    """How large the factors of each gate are, at which positions, and how much they change with the input.

    Sites of kind "gate" are profiled, and those of attention that weighs its heads, whose pattern was kept. A factor
    that hardly changes over examples is a weight; one that does is what is called attention.

    Args:
        cap: forwards of one length; several examples, or nothing is known of how factors change with the input.
        grid: rows and columns of the positions, where they are patches of an image. Gates of coarser scales, each half
            as large and rounded up, are found by their number of patches.

    Raises:
        CaptureError: no gate was captured, or the forwards have different lengths.

    >>> import workbench
    >>> from workbench.mechanisms import Place, get
    >>> gate = get("van").build(Place(4, 1, 6, causal=False, grid=(2, 3))).eval()
    >>> with workbench.attach(gate) as wb, wb.capture() as cap:
    ...     y = gate(torch.randn(5, 6, 4))
    >>> gate_profile(cap, grid=(2, 3))
    GateProfile(4 heads of 1 gates, 5 examples)
    """
    expect(Capture, cap=cap)
    found = _factors(cap)
    names: dict[str, list[Any]] = {"sites": [], "layers": [], "heads": []}
    numbers: dict[str, list[Tensor]] = {
        each: [] for each in ("mean", "low", "high", "negative", "by_input", "by_position")
    }
    maps, grids, n = {}, {}, 0
    for site, g in found.items():
        n, n_heads, length = g.shape
        for name, values in (("sites", site.name), ("layers", site.layer)):
            names[name] += [values] * n_heads
        names["heads"] += range(n_heads)
        of_positions = g.mean(0)  # [head, position]
        for name, value in (
            ("mean", of_positions.mean(-1)), ("low", g.amin((0, 2))), ("high", g.amax((0, 2))),
            ("negative", (g < 0).double().mean((0, 2))),
            ("by_input", g.var(0, correction=0).mean(-1).sqrt()),
            ("by_position", of_positions.var(-1, correction=0).sqrt()),
        ):  # fmt: skip
            numbers[name].append(value)
        maps[site.name], grids[site.name] = of_positions.mean(0), _grid_of(length, grid)
    rows: dict[str, Any] = {name: tuple(values) for name, values in names.items()}
    rows |= {name: torch.cat(values).cpu() for name, values in numbers.items()}
    return GateProfile(
        **rows, gates=tuple(maps), maps={name: each.cpu() for name, each in maps.items()}, grids=grids, n_examples=n,
        provenance=cap.provenance,
    )  # fmt: skip


def _factors(cap: Capture) -> dict[Site, Tensor]:
    """[example, head, position] in float64, by site."""
    found: dict[str, list[Tensor]] = {}
    sites: dict[str, Site] = {}
    for forward in cap.forwards:
        for name, one in forward.sites.items():
            if (factors := one.factors) is not None:
                sites[name] = one.site
                found.setdefault(name, []).append(factors.double())
    if not found:
        raise CaptureError(
            "no gate was captured", hint='wb.sites has their kind, "gate"; of attention that weighs its heads keep the '
            "pattern, with queries_keys=True",
        )  # fmt: skip
    for name, parts in found.items():
        lengths = sorted({part.shape[2] for part in parts})
        if len(lengths) > 1 or len(parts) < len(cap.forwards):
            raise CaptureError(
                f"the forwards have {', '.join(map(str, lengths))} positions" if len(lengths) > 1
                else f"{len(parts)} of {len(cap.forwards)} forwards have the gate",
                site=name, hint="capture inputs of one length, or profile cap.calls one by one",
            )  # fmt: skip
    return {sites[name]: torch.cat(parts) for name, parts in found.items()}


def _grid_of(length: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The grid, or the one of a coarser scale, of this many positions; one row of them if there is none."""
    while grid is not None:
        rows, columns = grid
        if rows * columns == length:
            return grid
        if rows * columns < length or max(grid) <= 1:
            break
        grid = (-(-rows // 2), -(-columns // 2))
    return 1, length
