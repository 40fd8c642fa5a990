"""The runs that are kept, and what two models differ by.

Intervals are over seeds: of weights and data, not of what is held out, which is the same for all. Of losses they are on
the scale of the loss. Of shares they are on the scale of log odds: how soon a model learns is what seeds differ in, and
learning curves of shares are about logistic, so that sooner or later means as much more or less in log odds wherever
the curve is, but little near 0 and 1 and much in the middle as a share. A spread of shares that is pooled over models
would be too wide for those near the ends and too narrow for those between.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from scipy.stats import t

from trained.plan import Model
from workbench.mechanisms.training.shipped import RUNS, read_runs
from workbench.storage import disk

LOSSES = ("text", "repeats", "text, all seen")
INSTEAD = {"text, all seen": "text"}  # of models that see all anyway
GROUPED = ("long_lora", "sink_lora")  # which do not
ANSWERS = 500
"""Shares of none or of all are taken as half an answer off, of so many: the fewest that a score is of are 256."""


@dataclass(frozen=True)
class Difference:
    """How much worse a model is than another, with the interval of that.

    Attributes:
        a, b: scores of the model and of the one that it is compared with, means over seeds on the scale of the
            interval; n_a, n_b: of how many seeds.
        mean, low, high: how much worse: of losses a − b, of shares b − a. df: degrees of freedom of the spread.
    """

    model: Model
    than: Model
    a: float
    b: float
    n_a: int
    n_b: int
    mean: float
    low: float
    high: float
    df: int


class Runs:
    """Runs as they are kept: a dict each, see `record`."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.records = list(records)

    @classmethod
    def read(cls) -> Runs:
        """Those that are shipped."""
        return cls(read_runs())

    def of(self, model: Model) -> list[Mapping[str, Any]]:
        """All seeds of a model."""
        return [run for run in self.records if _key(run) == model.key]

    def models(self, work: str) -> list[Model]:
        """Those of a work that there are runs of."""
        return [Model(*key) for key in sorted({_key(run) for run in self.records if run["work"] == work})]

    def has(self, model: Model, seed: int, steps: int, rows: int) -> bool:
        """Whether a run is there, of this budget."""
        found = [run for run in self.of(model) if run["seed"] == seed]
        return any((run["steps"], run["rows"], run["hidden"]) == (steps, rows, model.hidden) for run in found)

    def add(self, run: Mapping[str, Any]) -> None:
        """Keep a run, in the place of an older one of the same model and seed; written at once.

        What others have written in the meantime is kept too: several processes may train at a time.
        """
        same = (*_key(run), run["seed"])
        with alone():
            others = [each for each in read_runs() if (*_key(each), each["seed"]) != same]
            self.records = sorted([*others, dict(run)], key=lambda each: (*_key(each), each["seed"]))
            lines = ",\n".join(json.dumps(each, sort_keys=True) for each in self.records)
            disk.write(RUNS, f"[\n{lines}\n]\n")

    def values(self, model: Model, score: str) -> list[float]:
        """The score of each seed."""
        grouped = any(name.partition(":")[0] in GROUPED for name in model.layers)
        instead = score if grouped else INSTEAD.get(score, score)
        found = [run["scores"].get(score, run["scores"].get(instead)) for run in self.of(model)]
        return [value for value in found if value is not None]

    def mean(self, model: Model, score: str) -> float:
        """The mean over seeds."""
        return fmean(self.values(model, score))

    def spread(self, work: str, score: str) -> tuple[float, int]:
        """Standard deviation over seeds, of shares in log odds, pooled over all models of a work with several seeds.

        Returns:
            It, and its degrees of freedom.
        """
        return pooled([scaled(self.values(each, score), score) for each in self.models(work)])

    def worse(self, model: Model, than: Model, score: str) -> Difference | None:
        """How much worse a model is; None where a run is missing, or no model has several seeds.

        Of a loss the interval of the difference is Student's t. Of a share it is made of those of both shares, which
        are back from log odds and not even, by their squared distances from the means (Zou and Donner,
        doi:10.1002/sim.3095).
        """
        a, b = (scaled(self.values(each, score), score) for each in (model, than))
        sd, df = self.spread(model.work, score)
        if not a or not b or not df:
            return None
        wide = float(t.ppf(0.975, df)) * sd
        if score in LOSSES:
            mean, half = fmean(a) - fmean(b), wide * (1 / len(a) + 1 / len(b)) ** 0.5
            return Difference(model, than, fmean(a), fmean(b), len(a), len(b), mean, mean - half, mean + half, df)
        (low_a, mid_a, high_a), (low_b, mid_b, high_b) = (_shares(each, wide) for each in (a, b))
        mean = mid_b - mid_a
        low = mean - math.hypot(mid_b - low_b, high_a - mid_a)
        high = mean + math.hypot(high_b - mid_b, mid_a - low_a)
        return Difference(model, than, mid_a, mid_b, len(a), len(b), mean, low, high, df)


def scaled(values: Sequence[float], score: str) -> list[float]:
    """The values of a score on the scale of its intervals: losses as they are, shares as log odds."""
    if score in LOSSES:
        return list(values)
    inside = [min(max(value, 0.5 / ANSWERS), 1 - 0.5 / ANSWERS) for value in values]
    return [math.log(value / (1 - value)) for value in inside]


def _shares(odds: Sequence[float], wide: float) -> tuple[float, float, float]:
    """The share at the mean of log odds, and at the ends of its interval, in order."""
    middle, half = fmean(odds), wide / len(odds) ** 0.5
    return tuple(1 / (1 + math.exp(-at)) for at in (middle - half, middle, middle + half))  # type: ignore[return-value]


@contextmanager
def alone() -> Iterator[None]:
    """No other process of this machine changes the runs meanwhile."""
    try:
        import fcntl
    except ImportError:  # not on Windows: train one at a time there
        yield
        return
    folder = os.open(RUNS.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation inside the groups, taken as the same for all, and its degrees of freedom."""
    several = [group for group in groups if len(group) > 1]
    df = sum(len(group) - 1 for group in several)
    squares = sum((value - fmean(group)) ** 2 for group in several for value in group)
    return ((squares / df) ** 0.5 if df else float("nan")), df


def _key(run: Mapping[str, Any]) -> tuple[str, str, str, bool]:
    return run["work"], run["name"], run["layout"], run["hidden"] > 0
