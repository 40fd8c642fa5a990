"""What is left of a task, as a share of what the whole model adds to a model with everything ablated.

The share is (m(edited) − m(nothing)) / (m(model) − m(nothing)). Where its denominator may be 0, or is negative, it has
no meaning: a model that does no better than with everything ablated has nothing of which a share could be kept.
Patching has shares of the difference between prompts and twins, which may go either way, but must not be 0.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from workbench.analysis.statistics.intervals import mean_t, share_interval


@dataclass(frozen=True)
class Denominator:
    """m(model) − m(nothing), by which shares are divided; of patching m(prompts) − m(twins).

    Attributes:
        value: its mean over prompts. low, high: its 95 % t interval. sign: 1 where a higher metric is better, else −1;
            0 for prompts and twins, of which either may be higher.
    """

    value: float
    low: float
    high: float
    sign: int

    @classmethod
    def of(cls, full: Tensor, none: Tensor, sign: int = 0) -> Denominator:
        """From [example] of the metric with the whole model, and with all ablated; or on prompts, and on twins."""
        return cls(float((full - none).mean()), *mean_t(full - none, checked=False), sign)

    @property
    def defined(self) -> bool:
        """Whether the model is surely better whole than ablated, or prompts and twins surely differ; with one prompt,
        whether they do on it."""
        ends = (self.low, self.high) if self.low == self.low else (self.value, self.value)
        return any(all(sign * end > 0 for end in ends) for sign in ((self.sign,) if self.sign else (1, -1)))

    def __str__(self) -> str:
        what = "m(model) − m(all ablated)" if self.sign else "m(prompts) − m(twins)"
        within = f", 95 % interval [{self.low:.3g}, {self.high:.3g}]" if self.low == self.low else " on one prompt"
        return f"{what} is {self.value:.3g}{within}"

    def warn(self, what: str, stacklevel: int = 3) -> None:
        """Say that shares are undefined, where they are.

        Args:
            what: the result and the metric.
        """
        if not self.defined:
            why = (
                "The whole model is not surely better at this than with all ablated; look at the differences in the "
                "metric's own unit, take more prompts, or choose another ablation or metric"
                if self.sign
                else "The model does not surely tell them apart; look at the effects in the metric's own unit, take "
                "more prompts, or choose another metric"
            )
            warnings.warn(
                f"{what} is undefined as a share: {self}. {why}",
                UserWarning,
                stacklevel=stacklevel,
            )

    def interval(self, part: Tensor, full: Tensor, none: Tensor) -> tuple[float, float]:
        """95 % interval (Fieller) of the share of an [example] difference; NaN where shares are undefined."""
        return share_interval(part, full - none) if self.defined else (float("nan"), float("nan"))
