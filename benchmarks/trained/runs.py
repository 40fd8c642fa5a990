"""The runs that are kept, and what two models differ by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
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


@dataclass(frozen=True)
class Difference:
    """How much worse a model is than another, with the interval of that.

    Attributes:
        a, b: mean scores of the model and of the one that it is compared with; n_a, n_b: of how many seeds.
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
        """Keep a run, in the place of an older one of the same model and seed; written at once."""
        same = (*_key(run), run["seed"])
        self.records = [each for each in self.records if (*_key(each), each["seed"]) != same] + [dict(run)]
        self.records.sort(key=lambda each: (*_key(each), each["seed"]))
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
        """Standard deviation over seeds, pooled over all models of a work with several, and its degrees of freedom."""
        return pooled([self.values(each, score) for each in self.models(work)])

    def worse(self, model: Model, than: Model, score: str) -> Difference | None:
        """How much worse a model is; None where a run is missing, or no model has several seeds."""
        a, b = self.values(model, score), self.values(than, score)
        sd, df = self.spread(model.work, score)
        if not a or not b or not df:
            return None
        mean = (fmean(a) - fmean(b)) * (1 if score in LOSSES else -1)
        wide = float(t.ppf(0.975, df)) * sd * (1 / len(a) + 1 / len(b)) ** 0.5
        return Difference(model, than, fmean(a), fmean(b), len(a), len(b), mean, mean - wide, mean + wide, df)


def pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation inside the groups, taken as the same for all, and its degrees of freedom."""
    several = [group for group in groups if len(group) > 1]
    df = sum(len(group) - 1 for group in several)
    squares = sum((value - fmean(group)) ** 2 for group in several for value in group)
    return ((squares / df) ** 0.5 if df else float("nan")), df


def _key(run: Mapping[str, Any]) -> tuple[str, str, str, bool]:
    return run["work"], run["name"], run["layout"], run["hidden"] > 0
