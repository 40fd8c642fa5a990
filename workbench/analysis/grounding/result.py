"""The result of `grounding`: how much each head reads from each patch of each picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from workbench.analysis.grounding.clicks import click
from workbench.analysis.grounding.tiles import raster
from workbench.errors import WorkbenchError, nearest
from workbench.storage.result import Result
from workbench.storage.typed import Places
from workbench.tokens import utf8, visible

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("the pictures", "other image tokens", "the first token", "other text")
"""What the weights of a row lie on; together 1."""


@dataclass(frozen=True, repr=False)
class Grounding(Result):
    """What the heads of a language model read from the patches of pictures at chosen positions of a prompt.

    Attributes:
        positions, tokens, writes: of each row: its position, its token, and the token after it, which it writes (""
            where it is not known).
        labels, sites, layers, heads: of each head.
        weights: [row, head, patch] the model's own weights, sinks included.
        sinks: [head, patch] which patches are sinks of a head; they are left out of maps and shares.
        parts, masses: names of what the weight of a row lies on, and [row, head, part] how much, which sums to 1. The
            first is what `weights` are of, sinks included.
        sink_rule: how sinks were told, in words.
        places: position of each patch in the prompt. tile: of which tile it is. cells: its row and column there.
        boxes: (x0, y0, x1, y1) of each patch on its picture, in pixels; NaN where it shows nothing of the picture.
        tile_names, tile_pictures: of each tile. grids: its rows and columns.
        names, sizes: of each picture; height and width in pixels. pictures: each as [row, column, 3] from 0 to 255,
            made smaller to be shown.
        calls: over how many calls of a site weights are averages, such as the steps of a diffusion; 1 for a prompt.
    """

    form = "workbench.grounding"
    filled = ("row", "head", "patch", "tile", "picture")

    positions: Annotated[tuple[int, ...], "row"]
    tokens: Annotated[tuple[str, ...], "row"]
    writes: Annotated[tuple[str, ...], "row"]
    labels: Annotated[tuple[str, ...], "head"]
    sites: Annotated[tuple[str, ...], "head"]
    layers: Annotated[tuple[int, ...], "head"]
    heads: Annotated[tuple[int, ...], "head"]
    weights: Float[Tensor, "row head patch"]
    sinks: Bool[Tensor, "head patch"]
    parts: Annotated[tuple[str, ...], "part"]
    masses: Float[Tensor, "row head part"]
    sink_rule: str
    places: Int[Tensor, " patch"]
    tile: Annotated[tuple[int, ...], "patch", Places("tile")]
    cells: Int[Tensor, "patch 2"]
    boxes: Float[Tensor, "patch 4"]
    tile_names: Annotated[tuple[str, ...], "tile"]
    tile_pictures: Annotated[tuple[int, ...], "tile", Places("picture")]
    grids: Int[Tensor, "tile 2"]
    names: Annotated[tuple[str, ...], "picture"]
    sizes: Int[Tensor, "picture 2"]
    pictures: Annotated[tuple[UInt8[Tensor, "_ _ 3"], ...], "picture"]
    calls: int
    provenance: dict[str, Any]

    @property
    def kept(self) -> Tensor:
        """[row, head, patch] weights without those of sinks."""
        return self.weights.masked_fill(self.sinks, 0)

    @property
    def removed(self) -> Tensor:
        """[row, head] the weight that lay on sinks among the patches, and is in no map."""
        return (self.weights * self.sinks).sum(-1)

    @property
    def picture_of(self) -> Tensor:
        """[patch] of which picture each patch is."""
        return torch.tensor([self.tile_pictures[t] for t in self.tile])

    def on_pictures(self) -> Tensor:
        """[row, head, picture] weight on the patches of each picture, without sinks."""
        return _summed(self.kept, self.picture_of, len(self.names))

    def on_tiles(self) -> Tensor:
        """[row, head, tile] weight on the patches of each tile, without sinks."""
        return _summed(self.kept, torch.tensor(self.tile), len(self.tile_names))

    def pooled(self, heads: Sequence[int | str] | int | str | None = None) -> Tensor:
        """[row, patch] the mean over heads of the weights without sinks.

        Args:
            heads: numbers or labels such as "L3H2"; None for all.

        Raises:
            WorkbenchError: there is no such head.
        """
        return self.kept[:, self.which(heads)].mean(1)

    def which(self, heads: Sequence[int | str] | int | str | None) -> list[int]:
        """The places of heads among `labels`."""
        if heads is None:
            return list(range(len(self.labels)))
        asked = [heads] if isinstance(heads, (int, str)) else list(heads)
        found = []
        for one in asked:
            at = self.labels.index(one) if isinstance(one, str) and one in self.labels else one
            if isinstance(at, str) or not -len(self.labels) <= at < len(self.labels):
                raise WorkbenchError(f"there is no head {one!r}", hint=nearest(one, self.labels, "head"))
            found.append(at % len(self.labels))
        if not found:
            raise WorkbenchError("no head is given")
        return found

    def map(
        self,
        picture: int = 0,
        row: int = -1,
        heads: Sequence[int | str] | int | str | None = None,
        *,
        tile: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """[y, x] weight on each pixel of a picture, the mean over heads, without sinks.

        Patches spread their weight evenly over their boxes, tiles that lie over each other add up, and what lies in the
        padding around the picture is left out.

        Args:
            tile: of this tile alone. size: height and width of the map; None for those of `pictures[picture]`.

        Raises:
            WorkbenchError: there is no such picture, row, head or tile of the picture.
        """
        self.check_place("picture", picture, len(self.names))
        self.check_place("row", row, len(self.positions))
        picture %= len(self.names)
        of = self.picture_of == picture
        if tile is not None:
            self.check_place("tile", tile, len(self.tile_names))
            if self.tile_pictures[tile] != picture:
                raise WorkbenchError(f"tile {tile} is of {self.names[self.tile_pictures[tile]]}")
            of = of & (torch.tensor(self.tile) == tile % len(self.tile_names))
        shown = size or (self.pictures[picture].shape[0], self.pictures[picture].shape[1])
        return raster(self.pooled(heads)[row, of], self.boxes[of], self.sizes[picture].tolist(), shown)

    def click(
        self, picture: int = 0, row: int = -1, heads: Sequence[int | str] | int | str | None = None
    ) -> tuple[float, float]:
        """(x, y) on the picture where a click would land: the middle of the brightest region; see `clicks.click`.

        Raises:
            WorkbenchError: there is no such picture, row or head, or no weight on the picture.
        """
        self.check_place("picture", picture, len(self.names))
        self.check_place("row", row, len(self.positions))
        of = self.picture_of == picture % len(self.names)
        cells = torch.cat([torch.tensor(self.tile)[:, None], self.cells], 1)
        return click(self.pooled(heads)[row, of], self.boxes[of], cells[of])

    def check_place(self, what: str, at: int, n: int) -> None:
        """Raise a WorkbenchError where there is no such row, picture or tile."""
        if not -n <= at < n:
            raise WorkbenchError(f"there are {n} {what}s, and no {what} {at}")

    def top(self, n: int = 5, row: int = -1, heads: Sequence[int | str] | int | str | None = None) -> pd.DataFrame:
        """The patches with the most weight, as a mean over heads: tile, row, column, box and weight.

        Raises:
            WorkbenchError: there is no such row or head.
        """
        import pandas as pd

        self.check_place("row", row, len(self.positions))
        weights = self.pooled(heads)[row]
        best = weights.argsort(descending=True)[:n].tolist()
        corners = ("x0", "y0", "x1", "y1")
        return pd.DataFrame(
            {
                "picture": [self.names[int(self.picture_of[i])] for i in best],
                "tile": [self.tile_names[self.tile[i]] for i in best],
                "row": [int(self.cells[i, 0]) for i in best],
                "column": [int(self.cells[i, 1]) for i in best],
                "position": [int(self.places[i]) for i in best],
                **{name: [float(self.boxes[i, k]) for i in best] for k, name in enumerate(corners)},
                "weight": [float(weights[i]) for i in best],
            }
        )

    @property
    def table(self) -> pd.DataFrame:
        """One row per position and head: what its weight lies on, and the patch that it reads most."""
        import pandas as pd

        rows, heads = len(self.positions), len(self.labels)
        kept = self.kept
        best = kept.argmax(-1).flatten().tolist()
        masses = self.masses.flatten(0, 1).double().numpy()
        return pd.DataFrame(
            {
                "position": [p for p in self.positions for _ in range(heads)],
                "token": [utf8(t) for t in self.tokens for _ in range(heads)],
                "head": list(self.labels) * rows,
                "layer": list(self.layers) * rows,
                **{name: masses[:, k] for k, name in enumerate(self.parts)},
                "sinks": self.removed.flatten().double().numpy(),
                "tile": [self.tile_names[self.tile[i]] for i in best],
                "row": [int(self.cells[i, 0]) for i in best],
                "column": [int(self.cells[i, 1]) for i in best],
                "weight": kept.amax(-1).flatten().double().numpy(),
            }
        )

    def __repr__(self) -> str:
        best = self.top(1).iloc[0]
        return (
            f"Grounding({len(self.positions)} rows, {len(self.labels)} heads, {self.weights.shape[-1]} patches of "
            f"{len(self.names)} pictures; {visible(self.tokens[-1])} at {self.positions[-1]} reads {best['tile']}, row "
            f"{best['row']}, column {best['column']} most)"
        )


def _summed(weights: Tensor, of: Tensor, n: int) -> Tensor:
    """[row, head, n] sums of [row, head, patch] over patches of each."""
    return torch.zeros(*weights.shape[:2], n, dtype=weights.dtype).index_add_(2, of, weights)
