"""Faithfulness of circuits of growing size: MIB's curves, and the areas CPR and CMD under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.engine.setup import open_setup
from workbench.analysis.circuits.faithfulness import run_choices
from workbench.analysis.circuits.model.names import head_of
from workbench.analysis.circuits.shares import Denominator
from workbench.analysis.statistics.intervals import means_t
from workbench.errors import InterventionError, WorkbenchError, expect
from workbench.session.workbench import Workbench
from workbench.storage.result import Result
from workbench.tasks.base import Task
from workbench.workers.engine import Engine

if TYPE_CHECKING:
    import pandas as pd

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, repr=False)
class FaithfulnessCurve(Result):
    """Faithfulness of circuits of growing size, as MIB defines it for edges; see docs/circuits.md.

    f is a ratio of means over examples, which means nothing where the `denominator` may be 0 or is negative. Circuits
    of nodes differ from MIB's: there nothing means that all nodes are ablated, here that all scored ones are.

    Attributes:
        fractions: of all scored edges (or nodes). sizes: how many that is, rounded down.
        absolute, signed: [fraction] of f(C) when circuits are chosen by magnitude, or by signed score.
        kept_absolute, kept_signed: how many edges remain after those that lead nowhere are dropped; MIB's weighted
            counts can be higher, as they are taken after a first pass over these.
        higher_is_better: of the metric. examples: [2, fraction, example] of the metric, by magnitude first.
        full, none: [example] of the metric with the whole model, and with all ablated.
    """

    form = "workbench.faithfulness_curve"
    filled: ClassVar = ("fraction", "example")

    circuit: str
    task: str
    metric: str
    ablation: str
    level: str
    fractions: Annotated[tuple[float, ...], "fraction"]
    sizes: Annotated[tuple[int, ...], "fraction"]
    kept_absolute: Annotated[tuple[int, ...], "fraction"]
    kept_signed: Annotated[tuple[int, ...], "fraction"]
    examples: Float[Tensor, "2 fraction example"]
    full: Float[Tensor, " example"]
    none: Float[Tensor, " example"]
    provenance: dict[str, Any]
    higher_is_better: bool = True

    @property
    def absolute(self) -> list[float]:
        """f(C) = (m(C) − m(∅)) / (m(M) − m(∅)), circuits chosen by magnitude."""
        return self._shares(0)

    @property
    def signed(self) -> list[float]:
        """The same, circuits chosen by signed score."""
        return self._shares(1)

    def _shares(self, which: int) -> list[float]:
        return ((self.examples[which].mean(-1) - self.none.mean()) / self.denominator.value).tolist()

    @property
    def denominator(self) -> Denominator:
        """m(model) − m(nothing), its interval, and whether it is surely on the good side of 0."""
        return Denominator.of(self.full, self.none, 1 if self.higher_is_better else -1)

    @property
    def cpr(self) -> float:
        """Area under f, circuits by signed score; higher is better. It starts at the first fraction, as MIB's does."""
        return area(self.fractions, self.signed)

    @property
    def cpr_interval(self) -> tuple[float, float]:
        """95 % interval of `cpr` over prompts (Fieller's); NaN where shares are undefined."""
        steps = torch.tensor(self.fractions, dtype=torch.float64).diff()
        gains = self.examples[1] - self.none
        under = (steps[:, None] * (gains[1:] + gains[:-1]) / 2).sum(0)
        return self.denominator.interval(under, self.full, self.none)

    @property
    def cmd(self) -> float:
        """Area between f and 1, circuits by magnitude; 0 is best."""
        return area(self.fractions, [abs(1 - f) for f in self.absolute])

    def intervals(self, which: int = 0) -> list[tuple[float, float]]:
        """95 % intervals over prompts (Fieller's) of f at each fraction; 0 by magnitude, 1 signed."""
        return [self.denominator.interval(each - self.none, self.full, self.none) for each in self.examples[which]]

    @property
    def table(self) -> pd.DataFrame:
        """One row per size: shares with 95 % intervals over prompts, all NaN where no share is defined."""
        import pandas as pd

        low, high = zip(*self.intervals(0), strict=True)
        columns = {
            "fraction": self.fractions, "size": self.sizes, "kept": self.kept_absolute, "absolute": self.absolute,
            "low": low, "high": high, "kept_signed": self.kept_signed, "signed": self.signed,
        }  # fmt: skip
        frame = pd.DataFrame(columns)
        return frame if self.denominator.defined else frame.assign(absolute=float("nan"), signed=float("nan"))

    @property
    def in_metric(self) -> pd.DataFrame:
        """One row per size: the metric itself, with 95 % t intervals over prompts of circuits by magnitude."""
        import pandas as pd

        low, high = means_t(self.examples[0]).T.tolist()
        columns = {
            "fraction": self.fractions, "size": self.sizes, "absolute": self.examples[0].mean(-1).tolist(), "low": low,
            "high": high, "signed": self.examples[1].mean(-1).tolist(),
        }  # fmt: skip
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        if not self.denominator.defined:
            return f"FaithfulnessCurve(shares undefined: {self.denominator}, {self.ablation}; {self.circuit})"
        return f"FaithfulnessCurve(CPR {self.cpr:.3f}, CMD {self.cmd:.3f}, {self.ablation}; {self.circuit})"


def faithfulness_curve(
    wb: Workbench,
    circuit: Circuit,
    task: Task,
    *,
    fractions: Sequence[float] = MIB_FRACTIONS,
    ablation: str = "counterfactual",
    metric: Any = "logit_diff",
    seed: int = 0,
    batch_size: int = 25,
    memory: int = 1 << 30,
    engine: str | Engine = "local",
    progress: bool = True,
) -> FaithfulnessCurve:
    """Faithfulness of the top edges (or nodes) of a circuit's scores, at several sizes; CPR and CMD.

    Args:
        circuit: scores of this model, positive where an edge helps. fractions: of all that are scored, rising.
            Nodes that are not heads are kept at every size where they have no score.
        wb, task, metric: and the rest, as in `circuit_faithfulness`.

    Raises:
        InterventionError: a circuit of another model, without scores; fractions that do not rise from 0 to 1.

    Warns:
        UserWarning: m(model) − m(nothing) may be 0 or is negative, so that no share is defined.
    """
    expect(Workbench, wb=wb)
    expect(Circuit, circuit=circuit)
    expect(Task, task=task)
    several = tuple(float(f) for f in fractions)
    if not several or list(several) != sorted(set(several)) or not 0 < several[0] <= several[-1] <= 1:
        raise InterventionError(f"fractions rise from above 0 to at most 1, not {several}")
    scores = circuit.edge_scores if circuit.level == "edge" else circuit.node_scores
    n = circuit.graph.n_edges if circuit.level == "edge" else int((~scores.isnan()).sum())
    scored = int((~scores.isnan()).sum())
    if scored == 0:
        raise InterventionError("the circuit has no scores to choose by")
    if circuit.level == "edge" and scored < n:
        raise InterventionError(
            f"only {scored} of {n} edges are scored, so circuits of every size cannot be chosen",
            hint='score all edges with method="eap" or "eap_ig"',
        )
    with open_setup(wb, task, metric, batch_size=batch_size, memory=memory, seed=seed, engine=engine) as setup:
        circuit.check_model(setup.graph)
        setup.measure_baselines()
        sizes = [int(f * n) for f in several]
        choices, kept = [], []
        unscored = torch.tensor([head_of(name) is None for name in circuit.graph.senders]) & circuit.node_scores.isnan()
        for absolute in (True, False):
            for size in sizes:
                one = circuit.top(size, absolute=absolute)
                choices.append(one.edges_in if circuit.level == "edge" else one.senders_in | unscored)
                kept.append(one.n_edges if circuit.level == "edge" else size)
        choices.append(torch.zeros_like(choices[0]) if circuit.level == "edge" else unscored)
        values = run_choices(setup, torch.stack(choices), ablation, progress)
        found = FaithfulnessCurve(
            circuit=repr(circuit), task=task.name, metric=setup.metric.name, ablation=ablation, level=circuit.level,
            higher_is_better=setup.metric.higher_is_better, fractions=several,
            sizes=tuple(sizes), kept_absolute=tuple(kept[: len(sizes)]),
            kept_signed=tuple(kept[len(sizes) :]), examples=values[:-1].view(2, len(sizes), -1), full=setup.clean,
            none=values[-1], provenance=setup.provenance(),
        )  # fmt: skip
    found.denominator.warn(f"the faithfulness of {found.metric}")
    return found


def area(x: Sequence[float], y: Sequence[float]) -> float:
    """Area under straight lines between points, linear in x.

    >>> area([0.0, 0.5, 1.0], [0.0, 1.0, 1.0])
    0.75
    """
    if len(x) != len(y):
        raise WorkbenchError(f"{len(x)} and {len(y)} numbers are no points")
    return sum((b - a) * (u + v) / 2 for a, b, u, v in zip(x, x[1:], y, y[1:], strict=False))
