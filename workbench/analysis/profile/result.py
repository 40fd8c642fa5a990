"""`AttentionProfile`: how far each head looks and how it spreads its weight, per example and with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.statistics.intervals import means_t, without_interval
from workbench.errors import WorkbenchError, nearest
from workbench.storage.result import Result
from workbench.storage.typed import Between

if TYPE_CHECKING:
    import pandas as pd

MEASURES = (
    "mean_distance", "distance_spread", "entropy", "normalised_entropy", "total_entropy", "concentration",
    "head_diversity", "sink", "local_0", "local_1", "local_2", "local_3", "cls_to_patches", "patches_to_cls",
)  # fmt: skip
"""Names along the last axis of `AttentionProfile.examples`; `attention_profile` defines them."""


@dataclass(frozen=True, repr=False)
class AttentionProfile(Result):
    """What `attention_profile` measured. Rows are heads, in the order of the sites.

    Attributes:
        sites, layers, heads: of each row, its site's name, layer and head. labels: such as "L3H5".
        kind: "image" or "text". grid: rows and columns of patches; (1, longest text) for text.
        prefix: tokens before the patches, such as CLS. sink: what was done with the sink.
        bins: first and last hop of each bin.
        mass_examples: [example, row, bin] weight per query at these hops. density: [row, bin], mean weight of one pair.
        measures: names along the axis of `examples`, [example, row, measure]; NaN where one does not apply.
        offsets: [row, 2·rows − 1, 2·columns − 1] weight per query on the key (dy, dx) away, a mean over examples;
            (0, 0) is in the middle. Of text [row, 1, 2·r + 1], and only to r = 64 tokens.
        level: of the intervals over examples.
        skipped: sites without a distance (cross-attention, states), which have no rows.
        provenance: of the capture.
    """

    form = "workbench.attention_profile"
    former: ClassVar = ("seed", "n_bootstrap")

    sites: Annotated[tuple[str, ...], "row"]
    layers: Annotated[tuple[int, ...], "row"]
    heads: Annotated[tuple[int, ...], "row"]
    labels: Annotated[tuple[str, ...], "row"]
    kind: str
    grid: tuple[int, int]
    prefix: int
    sink: str
    bins: Annotated[tuple[tuple[int, int], ...], "bin"]
    mass_examples: Float[Tensor, "example row bin"]
    density: Float[Tensor, "row bin"]
    measures: Annotated[tuple[str, ...], "measure"]
    examples: Float[Tensor, "example row measure"]
    offsets: Float[Tensor, "row dy dx"]
    level: Annotated[float, Between(0, 1)]
    skipped: tuple[str, ...]
    provenance: dict[str, Any]

    @property
    def n_examples(self) -> int:
        """Examples: batch rows of all forwards."""
        return self.examples.shape[0]

    @property
    def mass(self) -> Tensor:
        """[row, bin] weight per query at these hops, a mean over examples."""
        return self.mass_examples.mean(0)

    @property
    def mass_interval(self) -> Tensor:
        """[row, bin, 2] Student's t interval of `mass`, the mean over examples; NaN with one example, and where few
        carry a mean."""
        return means_t(self.mass_examples.movedim(0, -1), self.level)

    def of(self, measure: str) -> Tensor:
        """[row] a measure's mean over the examples that it applies to.

        Raises:
            WorkbenchError: there is no such measure.
        """
        return self.examples[..., self._index(measure)].nanmean(0)

    def spread(self, measure: str) -> Tensor:
        """[row] a measure's standard deviation over examples; NaN with one example."""
        values = self.examples[..., self._index(measure)]
        count = values.isfinite().sum(0)
        away = (values - values.nanmean(0)).square().nansum(0)
        return torch.where(count > 1, (away / (count - 1).clamp(min=1)).sqrt(), torch.nan)

    def interval(self, measure: str) -> Tensor:
        """[row, 2] Student's t interval of a measure's mean over the examples it applies to; NaN of fewer than two,
        and where few carry a mean."""
        return means_t(self.examples[..., self._index(measure)].T, self.level)

    def _index(self, measure: str) -> int:
        if measure not in self.measures:
            raise WorkbenchError(f'a profile has no "{measure}"', hint=nearest(measure, self.measures, "measure"))
        return self.measures.index(measure)

    def row(self, label: str) -> int:
        """Row of a head.

        Raises:
            WorkbenchError: there is no such head.
        """
        if label not in self.labels:
            raise WorkbenchError(f'there is no head "{label}"', hint=nearest(label, self.labels, "head"))
        return self.labels.index(label)

    @property
    def table(self) -> pd.DataFrame:
        """One row per head: its measures, each with its spread over examples, and its mass by hop."""
        import pandas as pd

        columns: dict[str, Any] = {"site": self.sites, "layer": self.layers, "head": self.heads, "label": self.labels}
        for name in self.measures:
            columns |= {name: self.of(name).tolist(), f"{name}_std": self.spread(name).tolist()}
        mass = self.mass
        columns |= {f"mass_{bin_name(b)}": mass[:, i].tolist() for i, b in enumerate(self.bins)}
        return pd.DataFrame(columns)

    @property
    def trend(self) -> pd.DataFrame:
        """One row per site and measure (or bin of hops): the mean, least and greatest of its heads."""
        import pandas as pd

        named = {name: self.of(name) for name in self.measures}
        named |= {f"mass_{bin_name(b)}": self.mass[:, i] for i, b in enumerate(self.bins)}
        rows = []
        for site in dict.fromkeys(self.sites):
            which = [i for i, s in enumerate(self.sites) if s == site]
            for name, values in named.items():
                part = values[which]
                rows.append(
                    {"site": site, "layer": self.layers[which[0]], "measure": name, "mean": part.mean().item(),
                     "least": part.min().item(), "greatest": part.max().item()}
                )  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        where = f"{self.grid[0]} x {self.grid[1]} patches" if self.kind == "image" else f"up to {self.grid[1]} tokens"
        ends = torch.stack([self.interval(measure) for measure in self.measures])
        return (
            f"AttentionProfile({len(self.labels)} heads, {self.n_examples} examples, {where}, sink {self.sink}"
            f"{without_interval(ends, self.n_examples)})"
        )


def bin_name(hops: tuple[int, int]) -> str:
    """Such as "3" or "5-8"."""
    return str(hops[0]) if hops[0] == hops[1] else f"{hops[0]}-{hops[1]}"
