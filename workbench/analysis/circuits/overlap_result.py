"""The result of `circuit_overlap`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict

from jaxtyping import Float
from torch import Tensor

from workbench.analysis.statistics.intervals import middle
from workbench.storage.result import Result
from workbench.storage.typed import Keys

if TYPE_CHECKING:
    import pandas as pd

_Pair = tuple[float, float]
_Points = tuple[float, ...]


class _Values(TypedDict):
    jaccard: float
    of_a: float
    of_b: float
    rank_biased: float
    weighted: float


class _Curve(TypedDict):
    jaccard: _Points
    expected: _Points
    expected_low: _Points
    expected_high: _Points


class _Shared(TypedDict):
    name: str
    jaccard: float
    shared: tuple[str, ...]


class _Stage(_Shared, total=False):
    interval: _Pair


class _Left(TypedDict):
    do: str
    circuit: str
    random: bool
    task: str
    value: float
    interval: _Pair
    defined: bool
    examples: Float[Tensor, "3 prompt"]


@dataclass(frozen=True, repr=False)
class CircuitOverlap(Result):
    """Overlap of two circuits of one model.

    Attributes:
        a, b: short descriptions. tasks: their names. unit: "heads", "nodes" or "edges".
        shared, only_a, only_b: names, in the order of the model.
        values: measures by name: "jaccard" |A∩B| / |A∪B|; "of_a", "of_b": the share of one that the other has;
            "rank_biased" of the rankings by |score|, NaN where a circuit has no scores; "weighted" Σ min / Σ max of
            |scores| that add up to 1.
        intervals: 95 % by measure, of the mean overlap of circuits that are found with as many new prompts of both
            tasks, by how much the overlap varies when prompts are drawn anew; none where a circuit kept no single
            scores, or was given node by node. Circuits found with more prompts overlap more, if the tasks share what
            they use.
        null: [draw] Jaccard overlap when one circuit's heads are renamed at random within their layers (heads that
            share keys move with their group). Edges among inputs, MLPs and the logits keep their names: that both
            circuits have them is no evidence.
        statistic: what the p-value compares: "jaccard" of edges, and of circuits that were not chosen by their scores;
            "weighted" of other heads and nodes, since most heads are in most circuits.
        p_value: share of the renamings, the measured one included, that overlap at least as much; never 0.
        p_beyond_nodes: of edges, share of random circuits with the degrees of one circuit's nodes that overlap with the
            other at least as much, the larger of both directions; NaN of heads and nodes.
        stages: overlap stage by stage, where both have the same number: names, Jaccard and its interval.
        sizes: how many of the highest scores are matched, as far as both have scores that are not 0; fractions: of all
            items. curve: {"jaccard", "low", "high", "expected", "expected_low", "expected_high"} over them; expected is
            that of renamings, with the middle 95 %; no "low" and "high" where there are no intervals. Equal scores at
            the border share the places that are left.
        unscored: items that have no score in one of the two, which the curve leaves out.
        model: facts of the model's graph; see `Circuit`.
        cross_faithfulness: what is left of each task when each circuit is kept or ablated, one dict each: "do" ("keep"
            or "ablate"), "circuit", "task", "value" (share of clean minus all ablated), "interval", "defined" (whether
            such shares are), and "examples" [3, example]: the metric with the edit, clean, and with all ablated. Where
            "random", in place of the circuit random ones that have as much in every layer: their mean, lowest and
            highest. Empty without a Workbench.
    """

    form = "workbench.circuit_overlap"
    file_keys: ClassVar = {"cross_faithfulness": "cross"}
    filled: ClassVar = ("draw",)

    a: str
    b: str
    tasks: tuple[str, str]
    unit: str
    shared: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    values: Annotated[dict[str, float], _Values]
    intervals: Annotated[dict[str, _Pair], Keys("values", some=True)]
    null: Float[Tensor, " draw"]
    p_value: float
    stages: tuple[Annotated[dict[str, Any], _Stage], ...]
    sizes: Annotated[tuple[int, ...], "size"]
    fractions: Annotated[tuple[float, ...], "size"]
    curve: Annotated[dict[str, _Points], "size", _Curve]
    cross_faithfulness: tuple[Annotated[dict[str, Any], _Left], ...]
    ablation: str
    model: dict[str, Any]
    provenance: dict[str, Any]
    statistic: str = "jaccard"
    p_beyond_nodes: float = float("nan")
    unscored: int = 0

    @property
    def meaning(self) -> str:
        """What the p-values say, in a sentence each."""
        by = "" if self.statistic == "jaccard" else " by the mass of their scores"
        renamed = "With one circuit's heads renamed at random within layers"
        said = f"{renamed}, a share {self.p_value:.2g} overlaps as much{by}."
        if self.p_beyond_nodes == self.p_beyond_nodes:
            said += f" Of more shared edges than the nodes' degrees explain, p is {self.p_beyond_nodes:.2g}."
        return said + " Heads that matter for every task count too: compare with an unrelated task."

    @property
    def expected(self) -> float:
        """Mean Jaccard overlap with one circuit's heads renamed."""
        return float(self.null.mean())

    @property
    def table(self) -> pd.DataFrame:
        """One row per measure, stage and cross-faithfulness, which is NaN where it is undefined as a share."""
        import pandas as pd

        nan = float("nan")
        rows: list[tuple[str, str, float, float, float]] = []
        for name, value in self.values.items():
            rows.append(("overlap", name, value, *self.intervals.get(name, (nan, nan))))
        low, high = map(float, middle(self.null))
        rows.append(("chance", "jaccard", self.expected, low, high))
        for stage in self.stages:
            rows.append(("stage", stage["name"], stage["jaccard"], *stage.get("interval", (nan, nan))))
        for one in self.cross_faithfulness:
            circuit = f"random ones like {one['circuit']}'s" if one["random"] else f"{one['circuit']}'s circuit"
            what, value = f"{one['do']} {circuit}, run {one['task']}", one["value"]
            if not one["defined"]:
                _, full, none = one["examples"].mean(-1).tolist()
                what, value = f"{what} (no share: {full:.3g} whole, {none:.3g} with all ablated)", nan
            rows.append(("cross-faithfulness", what, value, *(one["interval"] if one["defined"] else (nan, nan))))
        return pd.DataFrame(rows, columns=["kind", "what", "value", "low", "high"])

    def __repr__(self) -> str:
        low, high = self.intervals.get("jaccard", (float("nan"),) * 2)
        total = len(self.shared) + len(self.only_a) + len(self.only_b)
        by_mass = f" by the mass of scores, {self.values['weighted']:.3f}" if self.statistic == "weighted" else ""
        known = self.p_beyond_nodes == self.p_beyond_nodes
        beyond = f", beyond the nodes' degrees p {self.p_beyond_nodes:.2g}" if known else ""
        return (
            f"CircuitOverlap({self.tasks[0]} and {self.tasks[1]}: {len(self.shared)} of {total} {self.unit} shared, "
            f"Jaccard {self.values['jaccard']:.3f} [{low:.3f}, {high:.3f}], chance {self.expected:.3f}, "
            f"p {self.p_value:.2g}{by_mass}{beyond})"
        )
