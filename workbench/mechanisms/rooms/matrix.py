"""All mechanisms against each other: what they can do, what they cost, what their heads look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from workbench.analysis.profile import AttentionProfile
from workbench.mechanisms.rooms.costs import Cost
from workbench.mechanisms.rooms.seen import Seen
from workbench.mechanisms.rooms.showing import Room
from workbench.mechanisms.training.shipped import read_runs

if TYPE_CHECKING:
    import pandas as pd

Better = Literal["high", "low"] | None
_WORKS = {"text": "text", "images": "images"}
_LOSSES = {"text": "code, nats", "repeats": "repeats, nats"}
"""Scores that are losses, which are good where they are low; all others are shares of right answers."""
_ALONE = {
    ("mqar", "8 pairs"): "8 pairs recalled", ("mqar", "far"): "recalled from afar", ("induction", "copy"): "copied",
}  # fmt: skip
"""Scores of models that are not shown: what each column says."""
_NATS, _SHARE = 0.2, 0.5  # differences of quality that are large: those of one seed from another are a tenth of it
_UNKNOWN = float("nan")


@dataclass(frozen=True)
class Measured:
    """One thing that was measured of mechanisms.

    Attributes:
        name, group: what it is called, and what it belongs to.
        better: whether "high" or "low" is good; None for neither. span: a difference that is large; None for no such.
        values: for each mechanism; NaN where it was not measured. said: how it was, "" for nothing to say.
    """

    name: str
    group: str
    better: Better
    span: float | None
    values: tuple[float, ...]
    said: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """Mechanisms by what was measured of each.

    Attributes:
        rooms: of the rows. columns: what was measured.
    """

    rooms: tuple[Room, ...]
    columns: tuple[Measured, ...]

    @property
    def table(self) -> pd.DataFrame:
        """A row for each mechanism: what was measured, and where its claims stand."""
        import pandas as pd

        measured = {each.name: each.values for each in self.columns}
        claims = {"claims": [one.standing for one in self.rooms]}
        return pd.DataFrame(measured | claims, index=[one.name for one in self.rooms])

    def __repr__(self) -> str:
        return self.table.to_string(float_format=lambda value: f"{value:.3g}")


def matrix(rooms: Sequence[Room]) -> Matrix:
    """What was measured of these mechanisms, side by side; columns of which nothing is known are left out.

    Quality is that of the shipped model, a mean over its training's other seeds where there are some; where it says so,
    that of models that were trained to recall or copy alone, and are not shipped. What heads do is
    a mean over all heads, or the strongest one's, on the input that all are shown; of models with random weights none.
    """
    columns = [*_quality(rooms), *_sizes(rooms), *_costs(rooms), *_heads(rooms)]
    return Matrix(tuple(rooms), tuple(each for each in columns if any(value == value for value in each.values)))


def _column(
    rooms: Sequence[Room],
    name: str,
    group: str,
    better: Better,
    find: Callable[[Room], tuple[float, str] | None],
    span: float | None = None,
) -> Measured:
    found = [find(one) or (_UNKNOWN, "not measured") for one in rooms]
    return Measured(name, group, better, span, tuple(value for value, _ in found), tuple(said for _, said in found))


def _of(one: Room, work: str) -> Seen | None:
    """The trained model of a work."""
    return next((seen for seen in one.seen if seen.work == work and seen.trained is not None), None)


def _quality(rooms: Sequence[Room]) -> list[Measured]:
    runs, found = read_runs(), []
    for work, word in _WORKS.items():
        models = [seen.trained for one in rooms if (seen := _of(one, work)) is not None and seen.trained is not None]
        there = dict.fromkeys(name for each in models for name in each.scores)
        for score in sorted(there, key=lambda name: list(_LOSSES).index(name) if name in _LOSSES else len(_LOSSES)):
            better: Better = "low" if score in _LOSSES else "high"

            def find(one: Room, score: str = score, work: str = work) -> tuple[float, str] | None:
                return _score(one, work, score, runs)

            span = _NATS if score in _LOSSES else _SHARE
            found.append(_column(rooms, _LOSSES.get(score, score), f"Quality, {word}", better, find, span))
    for (work, score), name in _ALONE.items():

        def told(one: Room, score: str = score, work: str = work) -> tuple[float, str] | None:
            models = [run for run in runs if (run["work"], run["name"], run["layout"]) == (work, one.name, "uniform")]
            return _mean([run["scores"][score] for run in models if run["hidden"]])

        found.append(_column(rooms, name, "Quality, trained on that alone", "high", told, _SHARE))
    return found


def _mean(values: Sequence[float]) -> tuple[float, str] | None:
    """The mean over seeds, and what it is of; None of no seed."""
    if not values:
        return None
    mean = sum(values) / len(values)
    return mean, "one seed" if len(
        values
    ) == 1 else f"mean of {len(values)} seeds, {min(values):.3g} to {max(values):.3g}"


def _score(one: Room, work: str, score: str, runs: Sequence[dict[str, Any]]) -> tuple[float, str] | None:
    seen = _of(one, work)
    if seen is None or seen.trained is None or score not in seen.trained.scores:
        return None
    same = {"work": work, "name": one.name, "layout": "uniform", "hidden": seen.trained.model.stack.hidden}
    alike = [run["scores"][score] for run in runs if all(run[key] == value for key, value in same.items())]
    quick = "; trained for a few steps, to see that it runs" if seen.trained.facts.get("quick") else ""
    mean, said = _mean(alike if len(alike) > 1 else [seen.trained.scores[score]]) or (_UNKNOWN, "")
    return mean, f"{said}{quick}"


def _sizes(rooms: Sequence[Room]) -> list[Measured]:
    found = []
    for work, word in _WORKS.items():

        def find(one: Room, work: str = work) -> tuple[float, str] | None:
            seen = _of(one, work)
            n = 0 if seen is None else sum(p.numel() for p in seen.model.parameters())
            return (n / 1000, f"{n:,} parameters") if n else None

        found.append(_column(rooms, f"parameters, {word}, thousands", "Size", None, find))
    return found


def _costs(rooms: Sequence[Room]) -> list[Measured]:
    lengths = [length for one in rooms if one.cost is not None for length in one.cost.lengths]
    if not lengths:
        return []
    top = max(lengths)

    def at_top(values: Callable[[Cost], Sequence[float]]) -> Callable[[Room], tuple[float, str] | None]:
        def find(one: Room) -> tuple[float, str] | None:
            if one.cost is None or top not in one.cost.lengths:
                return None
            return values(one.cost)[one.cost.lengths.index(top)], f"at {top:,} tokens"

        return find

    def exponent(one: Room) -> tuple[float, str] | None:
        if one.cost is None or one.cost.exponent is None:
            return None
        return one.cost.exponent, f"{one.cost.growth}, from {one.cost.lengths[0]:,} to {one.cost.lengths[-1]:,}"

    group = f"Cost at {top:,} tokens"
    return [
        _column(rooms, "time ÷ SDPA’s", group, "low", at_top(lambda cost: cost.over_sdpa)),
        _column(rooms, "memory, MiB", group, "low", at_top(lambda cost: cost.mib)),
        _column(rooms, "growth, exponent", group, "low", exponent),
    ]


def _heads(rooms: Sequence[Room]) -> list[Measured]:
    found = []
    for work, unit in (("text", "tokens"), ("images", "patches")):
        group = f"Heads, {work}"

        def profile(measure: str, said: str = "", work: str = work) -> Callable[[Room], tuple[float, str] | None]:
            def find(one: Room) -> tuple[float, str] | None:
                seen = _of(one, work)
                if seen is None or not isinstance(seen.profile, AttentionProfile):
                    return None
                return float(seen.profile.of(measure).nanmean()), f"mean over the heads{said}"

            return find

        found.append(_column(rooms, f"distance, {unit}", group, None, profile("mean_distance")))
        found.append(
            _column(
                rooms,
                f"entropy share, {work}",
                group,
                None,
                profile("normalised_entropy", ", of the largest that a row can have"),
            )
        )
    for statistic, said in {"previous": "previous token", "induction": "induction", "sink": "first token"}.items():

        def strongest(one: Room, statistic: str = statistic) -> tuple[float, str] | None:
            seen = _of(one, "text")
            by_head = {} if seen is None else _by_head(seen, statistic)
            if not by_head:
                return None
            label = max(by_head, key=lambda head: by_head[head])
            return by_head[label], f"weight of {label}, the strongest head"

        found.append(_column(rooms, said, "Strongest head, text", None, strongest))
    return found


def _by_head(seen: Seen, statistic: str) -> dict[str, float]:
    """The mean of a statistic over the rows that have one, by head; without those that have none."""
    found = {}
    for site in seen.capture:
        values: Tensor | None = site.statistics.get(statistic)
        if values is None:
            continue
        for head, value in enumerate(values.double().nanmean((0, 2)).tolist()):
            if value == value:
                found[site.site.label(head)] = value
    return found
