"""What activation patching gives: effects of patched heads, and of patched layers, on a metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.circuits.engine.setup import NOISING
from workbench.analysis.circuits.shares import Denominator
from workbench.analysis.statistics.intervals import share_intervals
from workbench.storage.result import Result
from workbench.tokens import utf8

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ["score", "low", "high", "effect", "standard_error"]


@dataclass(frozen=True, repr=False)
class Patched(Result):
    """What putting activations of one run into another does to a metric, one unit and place at a time.

    Attributes:
        activation: what was put in. places: names of the positions patched, one at a time; ("all",) for all at once.
        direction: "noising" or "denoising". sign: what a score means.
        effects: [unit, place, example] of the metric with the patch, minus without; NaN where a unit has no such place,
            because it is one of the other stream.
        clean, corrupted: [example] of the metric on prompts and twins.
    """

    activation: str
    places: Annotated[tuple[str, ...], "place"]
    direction: str
    sign: str
    task: str
    metric: str
    effects: Float[Tensor, "unit place example"]
    clean: Float[Tensor, " example"]
    corrupted: Float[Tensor, " example"]
    provenance: dict[str, Any]

    @property
    def _way(self) -> int:
        """What makes an effect one towards the prompts' run, −1 or 1."""
        return -1 if self.direction == NOISING else 1

    @property
    def _gap(self) -> Tensor:
        """[example] what effects are shares of."""
        return self.clean - self.corrupted

    @property
    def scores(self) -> Tensor:
        """[unit, place]: the mean effect, as a share of the difference between prompts and twins.

        0 where a patch changes nothing, 1 where it makes all of the difference: denoising (patched − corrupted) /
        (clean − corrupted), noising (clean − patched) / (clean − corrupted). It means nothing where the `denominator`
        may be 0.
        """
        return self._way * self.effects.mean(-1) / self._gap.mean()

    @property
    def denominator(self) -> Denominator:
        """By what scores are divided, and whether it is surely not 0."""
        return Denominator.of(self.clean, self.corrupted)

    @property
    def interval(self) -> Tensor:
        """[unit, place, 2] 95 % intervals (Fieller's) of `scores` over prompts; NaN where prompts and twins may not
        differ, or of one prompt."""
        return share_intervals(self._way * self.effects, self._gap)

    def _tabulated(
        self, units: dict[str, tuple[Any, ...]], places: dict[str, tuple[str, ...]], *, lacking: bool
    ) -> pd.DataFrame:
        """One row per unit and place, highest magnitude first: score, its interval, mean effect and its error.

        The score is NaN where it is undefined as a share.

        Args:
            units, places: columns, of what each is called. lacking: with rows of places that a unit has not.
        """
        import pandas as pd

        effects, ends, defined = self.effects.mean(-1), self.interval, self.denominator.defined
        scores = self.scores if defined else torch.full_like(effects, torch.nan)
        n = self.effects.shape[-1]
        error = self.effects.std(-1) / n**0.5 if n > 1 else torch.full_like(effects, torch.nan)
        rows = [
            (
                *(each[i] for each in units.values()), *(each[j] for each in places.values()),
                float(scores[i, j]), *ends[i, j].tolist(), float(effects[i, j]), float(error[i, j]),
            )
            for i in range(scores.shape[0])
            for j in range(scores.shape[1])
            if lacking or not bool(self.effects[i, j].isnan().all())
        ]  # fmt: skip
        frame = pd.DataFrame(rows, columns=[*units, *places, *_COLUMNS])
        by = "score" if defined else "effect"
        return frame.sort_values(by, key=abs, ascending=False, kind="stable").reset_index(drop=True)

    def _said(self, rows: pd.DataFrame, names: list[str]) -> str:
        """The first rows for a repr: shares, or effects where no share is defined."""
        if self.denominator.defined:
            return ", ".join(f"{name} {row.score:.2f}" for name, row in zip(names, rows.itertuples(), strict=True))
        each = ", ".join(f"{name} {row.effect:.3g}" for name, row in zip(names, rows.itertuples(), strict=True))
        return f"shares undefined: {self.denominator}; effects on {self.metric}: {each}"


@dataclass(frozen=True, repr=False)
class HeadPatching(Patched):
    """What putting single heads' activations from one run into another does to a metric.

    A positive score means that the clean activation helps the task, by a higher or a lower metric, whichever is better.

    Attributes:
        heads: labels, "L2KV1" for shared keys and values. layers, numbers: of each; of an encoder and a decoder apart.
        activation: "z", "q", "k", "v", "pattern", or "ablation".
        higher_is_better: of the metric. Others as in `Patched`, whose units are the heads.
    """

    form = "workbench.head_patching"

    heads: Annotated[tuple[str, ...], "unit"]
    layers: Annotated[tuple[int, ...], "unit"]
    numbers: Annotated[tuple[int, ...], "unit"]
    higher_is_better: bool = True

    @property
    def _way(self) -> int:
        return super()._way * (1 if self.higher_is_better else -1)

    @property
    def _gap(self) -> Tensor:
        gap = super()._gap
        return gap * gap.mean().sign()

    @property
    def table(self) -> pd.DataFrame:
        """One row per head and place, highest magnitude first: the score with its interval, and the mean effect."""
        units = {"head": self.heads, "layer": self.layers, "number": self.numbers}
        return self._tabulated(units, {"position": self.places}, lacking=True)

    def __repr__(self) -> str:
        rows = self.table.head(5)
        return f"HeadPatching({self.activation}, {self.direction}, {self.task}: {self._said(rows, list(rows['head']))})"


@dataclass(frozen=True, repr=False)
class LayerPatching(Patched):
    """What putting the stream, an attention's or an MLP's output from one run into another does to a metric.

    Attributes:
        rows: labels of the layers, "L3", or "decoder.3". layers: numbers of their blocks. streams: the residual stream
            of each, "encoder" or "decoder"; "" where there is one.
        activation: such as "resid_pre"; see `patch_layers`.
        tokens: the token of each place, where it is the same in all prompts; else "".

    All others are those of `Patched`, whose units are the layers.
    """

    form = "workbench.layer_patching"

    rows: Annotated[tuple[str, ...], "unit"]
    layers: Annotated[tuple[int, ...], "unit"]
    streams: Annotated[tuple[str, ...], "unit"]
    tokens: Annotated[tuple[str, ...], "place"]

    @property
    def table(self) -> pd.DataFrame:
        """One row per layer and place that it has, highest magnitude first: score, its interval, mean effect."""
        units = {"row": self.rows, "layer": self.layers}
        return self._tabulated(units, {"position": self.places, "token": tuple(map(utf8, self.tokens))}, lacking=False)

    def __repr__(self) -> str:
        rows = self.table.head(4)
        names = [f"{row.row} at {row.position}" for row in rows.itertuples()]
        return f"LayerPatching({self.activation}, {self.direction}, {self.task}: {self._said(rows, names)})"
