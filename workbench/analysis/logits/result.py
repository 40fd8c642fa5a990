"""The result of `logit_attribution`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from jaxtyping import Float
from torch import Tensor

from workbench.analysis.statistics.intervals import means_t, without_interval
from workbench.storage.result import Result
from workbench.tokens import visible

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class LogitAttribution(Result):
    """Shares of parts in a logit, or in the difference of two.

    Attributes:
        kinds: of each part: "embedding", "head", "attention bias", "mlp", "norm bias" or "unembedding bias". names,
            layers, numbers (of heads), sites: −1 and "" where a part has none. An MLP's own bias is part of it.
        values: [part, example] in logits; they sum to `logits` up to `rounding`.
        logits: [example] of the model: target minus contrast, before a softcap. capped: behind it.
        targets, contrasts: texts of the tokens, "" without a contrast. positions: columns in the inputs.
        cap: the logits' softcap; None without. norm: what was frozen. precision: dtypes that the model ran in.
    """

    form = "workbench.logit_attribution"
    filled = ("part", "example")

    kinds: Annotated[tuple[str, ...], "part"]
    names: Annotated[tuple[str, ...], "part"]
    layers: Annotated[tuple[int, ...], "part"]
    numbers: Annotated[tuple[int, ...], "part"]
    sites: Annotated[tuple[str, ...], "part"]
    values: Float[Tensor, "part example"]
    logits: Float[Tensor, " example"]
    capped: Float[Tensor, " example"]
    targets: Annotated[tuple[str, ...], "example"]
    contrasts: Annotated[tuple[str, ...], "example"]
    positions: Annotated[tuple[int, ...], "example"]
    cap: float | None
    norm: str
    precision: str
    provenance: dict[str, Any]

    @property
    def rounding(self) -> Tensor:
        """[example] the logit minus the sum of all parts: roundings of the model's dtype."""
        return self.logits.double() - self.values.double().sum(0)

    @property
    def interval(self) -> Tensor:
        """[part, 2] 95 % t intervals of the means over prompts; NaN of one prompt, and where few carry a mean."""
        return means_t(self.values)

    @property
    def table(self) -> pd.DataFrame:
        """One row per part, the largest magnitude first: mean share in logits, with its interval over prompts."""
        import pandas as pd

        ends = self.interval
        frame = pd.DataFrame(
            {
                "part": self.names, "kind": self.kinds, "layer": self.layers, "head": self.numbers, "site": self.sites,
                "value": self.values.double().mean(1).numpy(), "low": ends[:, 0].numpy(), "high": ends[:, 1].numpy(),
            }
        )  # fmt: skip
        return frame.sort_values("value", key=abs, ascending=False, kind="stable").reset_index(drop=True)

    @property
    def by_layer(self) -> pd.DataFrame:
        """Sums by layer and kind; heads of a layer together, embeddings and last biases at layer −1."""
        frame = self.table.groupby(["layer", "kind"], sort=True)["value"].sum().reset_index()
        return frame

    @property
    def asked(self) -> str:
        """What was taken apart, for titles: "logit of ␣Mary − ␣John"."""
        if len(set(self.targets)) > 1 or len(set(self.contrasts)) > 1:
            return "logit of the answers" + (" minus the wrong ones" if any(self.contrasts) else "")
        shown = f"logit of {visible(self.targets[0])}"
        return shown + (f" minus {visible(self.contrasts[0])}" if self.contrasts[0] else "")

    def __repr__(self) -> str:
        best = ", ".join(f"{row.part} {row.value:+.2f}" for row in self.table.head(5).itertuples())
        capped = "" if self.cap is None else f", before the softcap at {self.cap:g}"
        off = float(self.rounding.abs().max())
        return (
            f"LogitAttribution({self.asked}: {float(self.logits.mean()):.2f}{capped}, {len(self.targets)} prompts; "
            f"{best}; rounding {off:.1e}{without_interval(self.interval, len(self.targets))})"
        )
