"""What the statistics of a head mean, in words for labels and captions."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.kernels.gradients import GRADIENT_SUMS
from workbench.kernels.statistics import STATISTICS, VALUE_WEIGHTED


@dataclass(frozen=True)
class Quantity:
    """A number per head.

    Attributes:
        unit: "mass" runs from 0 to 1.
        meaning: half a sentence.
        signed: coloured around 0.
    """

    label: str
    unit: str = ""
    meaning: str = ""
    signed: bool = False


_LABELS = {
    "current": "Current token",
    "distance_var": "Distance variance",
    "lse": "Log-sum-exp",
    "previous": "Previous token",
}


def quantity(name: str) -> Quantity | None:
    """The quantity that a captured tensor gives when it is averaged over queries; None if it makes none.

    >>> quantity("value_weighted_sink").label, quantity("received")
    ('Sink, value-weighted', None)
    """
    if name in GRADIENT_SUMS:
        known = GRADIENT_SUMS[name]
        return Quantity(name.replace("_", " ").capitalize(), "", known.meaning, signed=True) if not known.axes else None
    base = name.removeprefix(VALUE_WEIGHTED)
    statistic = STATISTICS.get(base)
    if statistic is None or statistic.axes != "query" or statistic.unit == "position":
        return None
    label, meaning = _LABELS.get(base, base.replace("_", " ").capitalize()), statistic.meaning
    if base != name:
        label, meaning = f"{label}, value-weighted", f"{meaning}, with p·‖v‖ renormalised for p"
    return Quantity(label, statistic.unit, meaning, signed=statistic.range[0] < 0)
