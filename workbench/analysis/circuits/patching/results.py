"""What activation patching gives: effects of patched heads, and of patched layers, on a metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.circuits.engine.setup import NOISING
from workbench.analysis.statistics.intervals import share_intervals
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd


def _numbers(found: HeadPatching | LayerPatching) -> dict[tuple[int, int], tuple[float, ...]]:
    """(row, place) -> score, its interval, mean effect and its standard error."""
    scores, effects, ends = found.scores, found.effects.mean(-1), found.interval
    n = found.effects.shape[-1]
    error = found.effects.std(-1) / n**0.5 if n > 1 else torch.full_like(effects, torch.nan)
    return {
        (i, j): (float(scores[i, j]), *ends[i, j].tolist(), float(effects[i, j]), float(error[i, j]))
        for i in range(scores.shape[0])
        for j in range(scores.shape[1])
    }


_COLUMNS = ["score", "low", "high", "effect", "standard_error"]


@dataclass(frozen=True, repr=False)
class HeadPatching(Result):
    """What putting single heads' activations from one run into another does to a metric.

    Attributes:
        heads: labels, "L2KV1" for shared keys and values. layers, numbers: of each; of an encoder and a decoder apart.
        activation: "z", "q", "k", "v", "pattern", or "ablation".
        places: names of the positions patched, one at a time; ("all",) for all at once.
        direction: "noising" or "denoising". sign: what a positive effect means.
        effects: [head, place, example] of the metric with the patch, minus without; NaN where a head has no such
            place, because it is one of the other stream.
        clean, corrupted: [example] of the metric on prompts and twins. higher_is_better: of the metric.
    """

    form = "workbench.head_patching"

    heads: Annotated[tuple[str, ...], "head"]
    layers: Annotated[tuple[int, ...], "head"]
    numbers: Annotated[tuple[int, ...], "head"]
    activation: str
    places: Annotated[tuple[str, ...], "place"]
    direction: str
    sign: str
    task: str
    metric: str
    effects: Float[Tensor, "head place example"]
    clean: Float[Tensor, " example"]
    corrupted: Float[Tensor, " example"]
    provenance: dict[str, Any]
    higher_is_better: bool = True

    @property
    def scores(self) -> Tensor:
        """[head, place]: the mean effect, as a share of the difference between prompts and twins.

        Noising: the share of the difference that is lost. Denoising: that is restored. Positive: the clean activation
        helps the task, by a higher or a lower metric, whichever is better.
        """
        return self._gain * self.effects.mean(-1) / (self.clean.mean() - self.corrupted.mean()).abs()

    @property
    def _gain(self) -> int:
        """1 where a higher metric means that the clean activation helps, else −1."""
        return (1 if self.higher_is_better else -1) * (-1 if self.direction == NOISING else 1)

    @property
    def interval(self) -> Tensor:
        """[head, place, 2] 95 % intervals (Fieller's) of `scores` over prompts; NaN where prompts and twins may not
        differ, or of one prompt."""
        gap = self.clean - self.corrupted
        return share_intervals(self._gain * self.effects, gap * gap.mean().sign())

    @property
    def table(self) -> pd.DataFrame:
        """One row per head and place, highest magnitude first: the score with its interval, and the mean effect."""
        import pandas as pd

        rows = [
            (self.heads[i], self.layers[i], self.numbers[i], self.places[j], *numbers)
            for (i, j), numbers in _numbers(self).items()
        ]
        frame = pd.DataFrame(rows, columns=["head", "layer", "number", "position", *_COLUMNS])
        return frame.sort_values("score", key=abs, ascending=False, kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        best = ", ".join(f"{row.head} {row.score:.2f}" for row in self.table.head(5).itertuples())
        return f"HeadPatching({self.activation}, {self.direction}, {self.task}: {best})"


@dataclass(frozen=True, repr=False)
class LayerPatching(Result):
    """What putting the stream, an attention's or an MLP's output from one run into another does to a metric.

    Attributes:
        rows: labels of the layers, "L3", or "decoder.3". layers: numbers of their blocks. streams: the residual stream
            of each, "encoder" or "decoder"; "" where there is one.
        activation: such as "resid_pre"; see `patch_layers`.
        places: names of the positions patched, one at a time; ("all",) for all at once.
        tokens: the token of each place, where it is the same in all prompts; else "".
        direction: "noising" or "denoising". sign: what a score means.
        effects: [layer, place, example] of the metric with the patch, minus without; NaN where a layer has no such
            place, because it is one of the other stream.
        clean, corrupted: [example] of the metric on prompts and twins.
    """

    form = "workbench.layer_patching"

    rows: Annotated[tuple[str, ...], "layer"]
    layers: Annotated[tuple[int, ...], "layer"]
    streams: Annotated[tuple[str, ...], "layer"]
    activation: str
    places: Annotated[tuple[str, ...], "place"]
    tokens: Annotated[tuple[str, ...], "place"]
    direction: str
    sign: str
    task: str
    metric: str
    effects: Float[Tensor, "layer place example"]
    clean: Float[Tensor, " example"]
    corrupted: Float[Tensor, " example"]
    provenance: dict[str, Any]

    @property
    def scores(self) -> Tensor:
        """[layer, place]: the mean effect, as a share of the difference between prompts and twins.

        0 where a patch changes nothing, 1 where it makes all of the difference: denoising (patched − corrupted) /
        (clean − corrupted), noising (clean − patched) / (clean − corrupted).
        """
        return self._way * self.effects.mean(-1) / (self.clean.mean() - self.corrupted.mean())

    @property
    def _way(self) -> int:
        return -1 if self.direction == NOISING else 1

    @property
    def interval(self) -> Tensor:
        """[layer, place, 2] 95 % intervals (Fieller's) of `scores` over prompts; NaN where prompts and twins may not
        differ, or of one prompt."""
        return share_intervals(self._way * self.effects, self.clean - self.corrupted)

    @property
    def table(self) -> pd.DataFrame:
        """One row per layer and place that it has, highest magnitude first: score, its interval, mean effect."""
        import pandas as pd

        rows = [
            (self.rows[i], self.layers[i], self.places[j], self.tokens[j], *numbers)
            for (i, j), numbers in _numbers(self).items()
            if not bool(self.effects[i, j].isnan().all())
        ]
        frame = pd.DataFrame(rows, columns=["row", "layer", "position", "token", *_COLUMNS])
        return frame.sort_values("score", key=abs, ascending=False, kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        best = ", ".join(f"{row.row} at {row.position} {row.score:.2f}" for row in self.table.head(4).itertuples())
        return f"LayerPatching({self.activation}, {self.direction}, {self.task}: {best})"
