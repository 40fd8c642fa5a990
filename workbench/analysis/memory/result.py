"""The result of `memory_reading`: how much each frame reads of which remembered frame, and where in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from workbench.analysis.grounding import Grounding
from workbench.analysis.grounding.tiles import Tile
from workbench.errors import WorkbenchError
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("maps of remembered frames", "pointers to the object")
"""What the weight of a row of the memory attention lies on; together 1."""


@dataclass(frozen=True, repr=False)
class MemoryReading(Result):
    """What frames of a video read from the frames that a tracker remembers.

    Attributes:
        frames: at which was read. labels, sites, layers, heads: of each head of the memory attention.
        held: [step, slot] which frames are remembered at each, in their order; −1 for none.
        mapped: [step, slot] whether the frame's map is; of others only a pointer to the object.
        recall: [step, head, query, slot, cell] weight of each cell of the frame that reads on each cell of each frame.
        pointers: [step, head, slot] weight on the pointer of each frame, a mean over the cells that read.
        grid: rows and columns of the cells. logits: at each frame, whether the object is there: above 0 if so.
        size: height and width of the video. pictures: of each frame from 0 on, [row, column, 3], to be shown.
    """

    form = "workbench.memory_reading"
    filled = ("step", "head", "slot")

    frames: Annotated[tuple[int, ...], "step"]
    labels: Annotated[tuple[str, ...], "head"]
    sites: Annotated[tuple[str, ...], "head"]
    layers: Annotated[tuple[int, ...], "head"]
    heads: Annotated[tuple[int, ...], "head"]
    held: Int[Tensor, "step slot"]
    mapped: Bool[Tensor, "step slot"]
    recall: Float[Tensor, "step head query slot cell"]
    pointers: Float[Tensor, "step head slot"]
    grid: Int[Tensor, " 2"]
    logits: Annotated[tuple[float, ...], "step"]
    size: Int[Tensor, " 2"]
    pictures: Annotated[tuple[UInt8[Tensor, "_ _ 3"], ...], "frame"]
    provenance: dict[str, Any]

    def check_parts(self) -> None:
        """Cells fill the grid, and every frame that is named has its picture."""
        rows, columns = self.grid.tolist()
        if rows < 1 or self.recall.shape[2] != rows * columns or self.recall.shape[4] != rows * columns:
            raise WorkbenchError(f"{self.recall.shape[4]} cells are no grid of {rows} x {columns}")
        if int(self.held.max()) >= len(self.pictures) or max(self.frames) >= len(self.pictures):
            raise WorkbenchError(f"there are pictures of {len(self.pictures)} frames, and more are named")
        if int(self.size.min()) < 1:
            raise WorkbenchError(f"a video of {self.size.tolist()} pixels")

    @property
    def weights(self) -> Tensor:
        """[step, head, slot] weight on the map of each remembered frame, a mean over the cells that read."""
        return self.recall.sum(-1).mean(2)

    def remembered(self, frame: int) -> tuple[int, ...]:
        """The frames of which something is remembered at a frame.

        Raises:
            WorkbenchError: nothing was read at this frame.
        """
        return tuple(t for t in self.held[self._step(frame)].tolist() if t >= 0)

    def read(self, frame: int, of: int) -> Tensor:
        """[head] how much a frame reads of a remembered one, map and pointer.

        Raises:
            WorkbenchError: nothing was read at this frame, or the memory does not hold the other one any more.
        """
        step, slot = self._step(frame), self._slot(frame, of)
        return self.weights[step, :, slot] + self.pointers[step, :, slot]

    def recall_of(
        self, frame: int, pixels: Sequence[tuple[float, float]], of: Sequence[int] | None = None
    ) -> Grounding:
        """What the cells under pixels of a frame recall: weights on the cells of remembered frames, as a `Grounding`
        with a row for each pixel and a picture for each frame.

        Args:
            pixels: (x, y) on the video. of: remembered frames; None for all whose maps are.

        Raises:
            WorkbenchError: nothing was read at this frame, a pixel outside of it, or a frame whose map the memory does
                not hold any more.
        """
        step = self._step(frame)
        known = [t for t, there in zip(self.held[step].tolist(), self.mapped[step].tolist(), strict=True) if there]
        chosen = known if of is None else list(of)
        slots = [self._slot(frame, t) for t in chosen]
        lost = [t for t in chosen if t not in known]
        if lost or not chosen:
            raise WorkbenchError(
                f"of frame {lost[0]} the memory at frame {frame} holds a pointer, and no map" if lost else
                "no frame is given", hint=f"maps are held of frames {', '.join(map(str, known))}",
            )  # fmt: skip
        height, width = self.size.tolist()
        rows, columns = self.grid.tolist()
        queries = [self._cell(pixel, height, width, rows, columns) for pixel in pixels]
        if not queries:
            raise WorkbenchError("no pixel is given", hint="pixels=[(x, y)]")
        whole = self.recall[step][:, queries]  # [head, row, slot, cell]
        weights = whole[:, :, slots].flatten(2).transpose(0, 1).contiguous()
        maps = whole.sum((-1, -2)).T
        n = rows * columns
        tile = Tile(0, "", torch.arange(n).view(rows, columns), (0.0, 0.0, float(width), float(height)))
        names = tuple(f"frame {t}" for t in chosen)
        return Grounding(
            positions=tuple(queries), tokens=tuple(f"({x:g}, {y:g}) of frame {frame}" for x, y in pixels),
            writes=("",) * len(queries), labels=self.labels, sites=self.sites, layers=self.layers, heads=self.heads,
            weights=weights, sinks=torch.zeros(len(self.labels), n * len(slots), dtype=torch.bool), parts=PARTS,
            masses=torch.stack([maps, (1 - maps).clamp(min=0)], -1), sink_rule="none are taken out",
            places=torch.cat([slot * n + torch.arange(n) for slot in slots]),
            tile=tuple(i for i in range(len(slots)) for _ in range(n)),
            cells=torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2).repeat(len(slots), 1),
            boxes=tile.boxes().flatten(0, 1).float().repeat(len(slots), 1), tile_names=names,
            tile_pictures=tuple(range(len(slots))), grids=self.grid[None].repeat(len(slots), 1), names=names,
            sizes=self.size[None].repeat(len(slots), 1), pictures=tuple(self.pictures[t] for t in chosen), calls=1,
            provenance=dict(self.provenance),
        )  # fmt: skip

    @staticmethod
    def _cell(pixel: tuple[float, float], height: int, width: int, rows: int, columns: int) -> int:
        x, y = pixel
        if not 0 <= x < width or not 0 <= y < height:
            raise WorkbenchError(f"pixel ({x:g}, {y:g}) lies outside of the video of {width} x {height}")
        return int(y * rows / height) * columns + int(x * columns / width)

    def _step(self, frame: int) -> int:
        if frame not in self.frames:
            said = ", ".join(map(str, self.frames))
            raise WorkbenchError(f"nothing was read at frame {frame}", hint=f"read were frames {said}")
        return self.frames.index(frame)

    def _slot(self, frame: int, of: int) -> int:
        known = self.held[self._step(frame)].tolist()
        if of < 0 or of not in known:
            said = ", ".join(str(t) for t in known if t >= 0)
            raise WorkbenchError(
                f"the memory does not hold frame {of} at frame {frame}", hint=f"it holds frames {said}"
            )
        return known.index(of)

    @property
    def table(self) -> pd.DataFrame:
        """One row per frame, head and remembered frame: the weight on its map and on its pointer."""
        import pandas as pd

        weights = self.weights
        rows = [
            {
                "frame": frame, "head": label, "layer": self.layers[h], "remembered": t, "ago": frame - t,
                "map": float(weights[step, h, slot]), "pointer": float(self.pointers[step, h, slot]),
                "object_logit": self.logits[step],
            }
            for step, frame in enumerate(self.frames)
            for h, label in enumerate(self.labels)
            for slot, t in enumerate(self.held[step].tolist())
            if t >= 0
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        step = len(self.frames) - 1
        total = (self.weights + self.pointers)[step].mean(0)
        most = int(total.argmax())
        return (
            f"MemoryReading({len(self.frames)} frames, {len(self.labels)} heads; frame {self.frames[step]} remembers "
            f"{', '.join(map(str, self.remembered(self.frames[step])))} and reads {int(self.held[step, most])} most, "
            f"{float(total[most]):.2f})"
        )
