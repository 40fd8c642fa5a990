"""`pointing`: whether maps point at the boxes that they should point at, against chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.grounding.result import Grounding
from workbench.analysis.grounding.tiles import Box, raster
from workbench.analysis.statistics.intervals import mean_t, proportions
from workbench.errors import WorkbenchError, nearest
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("pointing_game", "top_patch", "top_patch_overlap", "mass", "energy")
"""What is measured of each map; see `pointing`."""


@dataclass(frozen=True, repr=False)
class Pointing(Result):
    """How well maps point at boxes.

    Attributes:
        names: of the examples. boxes: (x0, y0, x1, y1) of each, in pixels of its picture.
        values: [example, measure] of `MEASURES`; NaN where nothing lies on the picture.
        chance: [example, measure] what a map that is the same everywhere has.
        level: of the intervals in `table`.
    """

    form = "workbench.pointing"
    filled = ("example",)

    names: Annotated[tuple[str, ...], "example"]
    boxes: Float[Tensor, "example 4"]
    values: Float[Tensor, "example 5"]
    chance: Float[Tensor, "example 5"]
    level: float
    provenance: dict[str, Any]

    def of(self, measure: str) -> float:
        """The mean of a measure over the examples that have it.

        Raises:
            WorkbenchError: there is no such measure.
        """
        return float(self.values[:, _place(measure)].nanmean())

    def by_chance(self, measure: str) -> float:
        """The mean of what a measure is by chance; raises as `of`."""
        return float(self.chance[:, _place(measure)].nanmean())

    @property
    def table(self) -> pd.DataFrame:
        """One row per measure: mean over examples, its interval (exact for hits, else Student's t), and chance."""
        import pandas as pd

        rows = []
        for k, name in enumerate(MEASURES):
            values = self.values[:, k][~self.values[:, k].isnan()].double()
            hits = bool(((values == 0) | (values == 1)).all())
            low, high = proportions(values, self.level).tolist() if hits else mean_t(values, self.level)
            chance = float(self.chance[:, k].nanmean())
            mean = float(values.mean()) if len(values) else float("nan")
            rows.append({"measure": name, "mean": mean, "low": low, "high": high, "chance": chance, "n": len(values)})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        hit, chance = self.of("top_patch"), self.by_chance("top_patch")
        return f"Pointing({len(self.names)} examples; the top patch hits {hit:.3f}, by chance {chance:.3f})"


def _place(measure: str) -> int:
    if measure not in MEASURES:
        raise WorkbenchError(f"there is no measure {measure!r}", hint=nearest(measure, MEASURES, "measure"))
    return MEASURES.index(measure)


def pointing(
    found: Sequence[Grounding] | Grounding,
    boxes: Sequence[Box] | Tensor,
    *,
    picture: int = 0,
    row: int = -1,
    heads: Sequence[int | str] | int | str | None = None,
    tolerance: float = 0,
    level: float = 0.95,
) -> Pointing:
    """Whether the weight of heads points at an object, of each picture with its box.

    Maps are means over heads without sinks. Of each, on the pixels of its picture:

    * pointing_game: whether the largest pixel lies in the box, or at most `tolerance` pixels from it (Zhang et al.
      2018, arXiv 1608.00507); where several are largest, the share of them.
    * top_patch: whether the middle of the patch with the most weight lies in the box.
    * top_patch_overlap: whether that patch overlaps the box.
    * mass: the share of the weight on the picture that lies in the box (the energy-based pointing game, Wang et al.
      2020, arXiv 1910.01279).
    * energy: that share over the share of the picture that the box fills; 1 by chance.

    Chance is what a map that is the same on every pixel has, and a patch that is drawn from all with equal odds.

    Args:
        found: of each example, as `workbench.grounding` gives it. boxes: (x0, y0, x1, y1) of each, x to the right.
        picture, row, heads: of which picture of each example, at which row, over which heads.

    Raises:
        WorkbenchError: not as many boxes as examples, a box that is empty or lies outside of its picture, or a
            picture, row or head that an example does not have.
    """
    several = [found] if isinstance(found, Grounding) else list(found)
    try:
        wanted = torch.as_tensor(boxes, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise WorkbenchError(f"boxes are four numbers (x0, y0, x1, y1) each: {error}") from None
    wanted = wanted[None] if wanted.dim() == 1 else wanted
    if not several or wanted.shape != (len(several), 4):
        raise WorkbenchError(f"{len(several)} examples need a box (x0, y0, x1, y1) each", shape=wanted.shape)
    if not tolerance >= 0 or not 0 < level < 1:
        raise WorkbenchError(f"tolerance is at least 0 and level between 0 and 1, not {tolerance} and {level}")
    values, chances = [], []
    for example, (one, box) in enumerate(zip(several, wanted, strict=True)):
        one.check_place("picture", picture, len(one.names))
        one.check_place("row", row, len(one.positions))
        size = one.sizes[picture].tolist()
        _check_box(box, size, example)
        of = one.picture_of == picture % len(one.names)
        value, chance = _measure(one.pooled(heads)[row, of], one.boxes[of].double(), box, size, tolerance)
        values.append(value)
        chances.append(chance)
    names = tuple(f"{i} {one.names[picture]}" for i, one in enumerate(several))
    return Pointing(names, wanted, torch.stack(values), torch.stack(chances), level, dict(several[0].provenance))


def _check_box(box: Tensor, size: Sequence[int], example: int) -> None:
    x0, y0, x1, y1 = box.tolist()
    if not (x1 > x0 and y1 > y0):
        raise WorkbenchError(f"the box of example {example} is empty: {box.tolist()}", hint="it is (x0, y0, x1, y1)")
    if x0 < 0 or y0 < 0 or x1 > size[1] or y1 > size[0]:
        raise WorkbenchError(
            f"the box of example {example} lies outside of its picture of {size[0]} x {size[1]}: {box.tolist()}",
            hint="boxes are (x0, y0, x1, y1) in pixels of the picture, x to the right",
        )


def _measure(
    weights: Tensor, patches: Tensor, box: Tensor, size: Sequence[int], tolerance: float
) -> tuple[Tensor, Tensor]:
    """[measure] of one map, and what a map that is the same everywhere has."""
    drawn = raster(weights, patches, size, size).double()
    total = drawn.sum()
    inside = raster(torch.ones(1), box[None], size, size).double() * (box[2] - box[0]) * (box[3] - box[1])
    area = float(inside.sum()) / (size[0] * size[1])
    grown = box + tolerance * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    x, y = torch.arange(size[1]) + 0.5, torch.arange(size[0]) + 0.5
    near = ((y > grown[1]) & (y < grown[3]))[:, None] & ((x > grown[0]) & (x < grown[2]))
    placed = patches.isfinite().all(-1)
    middles = (patches[:, :2] + patches[:, 2:]) / 2
    centred = ((middles > box[:2]) & (middles < box[2:])).all(-1)
    over = ((patches[:, :2] < box[2:]) & (patches[:, 2:] > box[:2])).all(-1)
    shares = [float(each.double().mean()) for each in (near, centred[placed], over[placed])]
    by_chance = torch.tensor([*shares, area, 1.0], dtype=torch.float64)
    if not float(total) > 0:
        return torch.full_like(by_chance, torch.nan), by_chance
    largest = drawn >= drawn.max() * (1 - 1e-9)
    best = int(weights.masked_fill(~placed, -1).argmax())
    mass = float((drawn * inside).sum() / total)
    values = [float(near[largest].double().mean()), float(centred[best]), float(over[best]), mass, mass / area]
    return torch.tensor(values, dtype=torch.float64), by_chance
