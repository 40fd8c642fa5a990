"""How far to trust a circuit: faithfulness, completeness and minimality, and MIB's curves over sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.engine.edges import run_edges, run_nodes
from workbench.analysis.circuits.engine.study import Study, open_study
from workbench.analysis.circuits.model.names import head_of
from workbench.analysis.statistics.intervals import interval
from workbench.errors import InterventionError, WorkbenchError
from workbench.session.workbench import Workbench
from workbench.storage.result import Result
from workbench.tasks.base import Task

if TYPE_CHECKING:
    import pandas as pd

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, repr=False)
class Faithfulness(Result):
    """What is left of a task when everything outside of a circuit is ablated.

    Attributes:
        circuit: its short description. task, metric, ablation: names.
        alone: [example] of the metric with the circuit alone. full, none: with the whole model, and with all ablated.
        without: [subset, example] of the whole model with only a subset of the circuit ablated; `alone_without`: of
            the circuit alone without that subset too. subsets: their nodes. Empty unless completeness was asked for.
        minus_one: [node, example] of the circuit alone without one node; `members`: those nodes. Empty unless
            minimality was asked for.
    """

    form = "workbench.faithfulness"

    circuit: str
    task: str
    metric: str
    ablation: str
    alone: Tensor
    full: Tensor
    none: Tensor
    subsets: tuple[tuple[str, ...], ...]
    without: Tensor
    alone_without: Tensor
    members: tuple[str, ...]
    minus_one: Tensor
    provenance: dict[str, Any]

    @property
    def value(self) -> float:
        """(m(circuit) − m(nothing)) / (m(model) − m(nothing)); 1 is perfect, and it can lie above."""
        return self._share(self.alone)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of `value` over prompts."""
        return self._interval(self.alone - self.none)

    @property
    def incompleteness(self) -> list[float]:
        """|F(circuit without K) − F(model without K)| for each subset K, as a share; 0 is complete."""
        span = float(self.full.mean() - self.none.mean())
        return ((self.alone_without.mean(-1) - self.without.mean(-1)) / span).abs().tolist()

    @property
    def minimality(self) -> dict[str, float]:
        """By how much the circuit alone falls when one node is left out, as a share; near 0: it is not needed."""
        span = float(self.full.mean() - self.none.mean())
        fall = ((self.alone.mean() - self.minus_one.mean(-1)) / span).tolist() if self.members else []
        return dict(zip(self.members, fall, strict=True))

    def _share(self, values: Tensor) -> float:
        return float((values.mean() - self.none.mean()) / (self.full.mean() - self.none.mean()))

    def _interval(self, differences: Tensor, absolute: bool = False) -> tuple[float, float]:
        """95 % bootstrap interval over prompts of the mean of [example] differences, as a share."""

        def share(index: Tensor) -> float:
            mean = differences[index].mean() / (self.full[index].mean() - self.none[index].mean())
            return float(mean.abs() if absolute else mean)

        return interval(share, len(differences))

    @property
    def table(self) -> pd.DataFrame:
        """One row per quantity, with 95 % bootstrap intervals over prompts."""
        import pandas as pd

        rows = [("faithfulness", "", self.value, *self.interval)]
        changes = zip(self.subsets, self.incompleteness, self.alone_without - self.without, strict=True)
        rows += [("incompleteness", " ".join(k), v, *self._interval(d, absolute=True)) for k, v, d in changes]
        falls = zip(self.minimality.items(), self.alone - self.minus_one, strict=False)
        rows += [("minimality", node, v, *self._interval(d)) for (node, v), d in falls]
        return pd.DataFrame(rows, columns=["quantity", "of", "value", "low", "high"])

    def __repr__(self) -> str:
        low, high = self.interval
        return f"Faithfulness({self.value:.3f} [{low:.3f}, {high:.3f}], {self.ablation}; {self.circuit})"


def circuit_faithfulness(
    wb: Workbench,
    circuit: Circuit,
    task: Task,
    *,
    ablation: str = "counterfactual",
    metric: Any = "logit_diff",
    n_subsets: int = 0,
    minimality: bool = False,
    keep_mlps: bool | None = None,
    seed: int = 0,
    batch_size: int = 25,
    memory: int = 1 << 30,
    progress: bool = True,
) -> Faithfulness:
    """Keep a circuit, ablate everything else, and measure the task.

    Args:
        wb: the model. circuit: of this model; its edges where it was chosen by edges, else its nodes.
        task: the circuit's or another.
        ablation: what stands in for the rest: "counterfactual" (the twin), "zero", "mean", "mean_positional" or
            "resample".
        metric: a name or a function, as in `find_circuit`.
        n_subsets: random halves of the circuit to test its completeness with (Wang et al. 2211.00593).
        minimality: leave out each node in turn.
        keep_mlps: whether a circuit of nodes keeps all MLPs, and the input; by default where it has none itself.
        seed: of the subsets.

    Raises:
        InterventionError: an empty circuit, or one of another model. TaskError: bad prompts or metric.
    """
    circuit.check_not_empty()
    with open_study(wb, task, metric, batch_size=batch_size, memory=memory) as study:
        circuit.check_model(study.graph)
        study.measure_baselines()
        kept, members = kept_parts(circuit, keep_mlps)
        nothing = _without(circuit, kept, members, members)
        generator = torch.Generator().manual_seed(seed)
        subsets = []
        for _ in range(n_subsets):
            order = torch.randperm(len(members), generator=generator).tolist()
            subsets.append(tuple(members[i] for i in sorted(order[: max(1, len(members) // 2)])))
        everything = torch.ones_like(kept) if kept.dim() == 1 else study.graph.exists
        choices = [kept, nothing]
        choices += [_without(circuit, everything, members, k) for k in subsets]
        choices += [_without(circuit, kept, members, k) for k in subsets]
        choices += [_without(circuit, kept, members, (node,)) for node in members if minimality]
        values = run_choices(study, torch.stack(choices), ablation, progress)
        n = len(subsets)
        return Faithfulness(
            circuit=repr(circuit), task=task.name, metric=study.metric.name, ablation=ablation,
            alone=values[0], full=study.clean, none=values[1], subsets=tuple(subsets),
            without=values[2 : 2 + n], alone_without=values[2 + n : 2 + 2 * n],
            members=tuple(members) if minimality else (), minus_one=values[2 + 2 * n :],
            provenance=study.provenance() | {"circuit": circuit.provenance.get("task", {})},
        )  # fmt: skip


def kept_parts(circuit: Circuit, keep_mlps: bool | None) -> tuple[Tensor, list[str]]:
    """What a circuit keeps, [sender] or [sender, receiver] bool, and the nodes that can be left out of it."""
    graph = circuit.graph
    if circuit.level == "edge":
        inputs = {graph.senders[i] for i in graph.inputs}
        return circuit.edges_in, [name for name in circuit.nodes if name in graph.sender_index and name not in inputs]
    kept = circuit.senders_in.clone()
    members = [graph.senders[i] for i in kept.nonzero()[:, 0].tolist()]
    if keep_mlps is None:
        keep_mlps = all(head_of(name) is not None for name in members)
    if keep_mlps:
        kept |= torch.tensor([head_of(name) is None for name in graph.senders])
    return kept, members


def run_choices(study: Study, choices: Tensor, ablation: str, progress: bool) -> Tensor:
    """[choice, example] of the metric, for choices of nodes [choice, sender] or edges [choice, sender, receiver]."""
    run = run_nodes if choices.dim() == 2 else run_edges
    return run(study, choices, ablation, progress, "keeping circuits")


def _without(circuit: Circuit, kept: Tensor, members: Sequence[str], left_out: Sequence[str]) -> Tensor:
    """What is kept when some nodes are left out: their output, and all that they would read."""
    graph = circuit.graph
    if kept.dim() == 2 and len(left_out) == len(members):
        return torch.zeros_like(kept)
    made = kept.clone()
    for name in left_out:
        made[graph.sender_index[name]] = False
    return made


@dataclass(frozen=True, repr=False)
class FaithfulnessCurve(Result):
    """Faithfulness of circuits of growing size, as MIB defines it for edges; see docs/circuits.md.

    f is a ratio of means over examples. Circuits of nodes differ from MIB's: there nothing means that all nodes are
    ablated, here that all scored ones are.

    Attributes:
        fractions: of all scored edges (or nodes). sizes: how many that is, rounded down.
        absolute, signed: [fraction] of f(C) when circuits are chosen by magnitude, or by signed score.
        kept_absolute, kept_signed: how many edges remain after those that lead nowhere are dropped; MIB's weighted
            counts can be higher, as they are taken after a first pass over these.
        examples: [2, fraction, example] of the metric, by magnitude first.
        full, none: [example] of the metric with the whole model, and with all ablated.
    """

    form = "workbench.faithfulness_curve"

    circuit: str
    task: str
    metric: str
    ablation: str
    level: str
    fractions: tuple[float, ...]
    sizes: tuple[int, ...]
    kept_absolute: tuple[int, ...]
    kept_signed: tuple[int, ...]
    examples: Tensor
    full: Tensor
    none: Tensor
    provenance: dict[str, Any]

    @property
    def absolute(self) -> list[float]:
        """f(C) = (m(C) − m(∅)) / (m(M) − m(∅)), circuits chosen by magnitude."""
        return self._shares(0)

    @property
    def signed(self) -> list[float]:
        """The same, circuits chosen by signed score."""
        return self._shares(1)

    def _shares(self, which: int) -> list[float]:
        none = self.none.mean()
        return ((self.examples[which].mean(-1) - none) / (self.full.mean() - none)).tolist()

    @property
    def cpr(self) -> float:
        """Area under f, circuits by signed score; higher is better. It starts at the first fraction, as MIB's does."""
        return area(self.fractions, self.signed)

    @property
    def cmd(self) -> float:
        """Area between f and 1, circuits by magnitude; 0 is best."""
        return area(self.fractions, [abs(1 - f) for f in self.absolute])

    def intervals(self, which: int = 0) -> list[tuple[float, float]]:
        """95 % bootstrap intervals over prompts of f at each fraction; 0 by magnitude, 1 signed."""
        found = []
        for values in self.examples[which]:

            def share(index: Tensor, values: Tensor = values) -> float:
                none = self.none[index].mean()
                return float((values[index].mean() - none) / (self.full[index].mean() - none))

            found.append(interval(share, len(self.full), n_bootstrap=400))
        return found

    @property
    def table(self) -> pd.DataFrame:
        """One row per size."""
        import pandas as pd

        low, high = zip(*self.intervals(0), strict=True)
        columns = {
            "fraction": self.fractions, "size": self.sizes, "kept": self.kept_absolute, "absolute": self.absolute,
            "low": low, "high": high, "kept_signed": self.kept_signed, "signed": self.signed,
        }  # fmt: skip
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        return f"FaithfulnessCurve(CPR {self.cpr:.3f}, CMD {self.cmd:.3f}, {self.ablation}; {self.circuit})"


def faithfulness_curve(
    wb: Workbench,
    circuit: Circuit,
    task: Task,
    *,
    fractions: Sequence[float] = MIB_FRACTIONS,
    ablation: str = "counterfactual",
    metric: Any = "logit_diff",
    batch_size: int = 25,
    memory: int = 1 << 30,
    progress: bool = True,
) -> FaithfulnessCurve:
    """Faithfulness of the top edges (or nodes) of a circuit's scores, at several sizes; CPR and CMD.

    Args:
        circuit: scores of this model, positive where an edge helps. fractions: of all that are scored, rising.
            Nodes that are not heads are kept at every size where they have no score.
        Others: as in `circuit_faithfulness`.

    Raises:
        InterventionError: a circuit of another model, without scores; fractions that do not rise from 0 to 1.
    """
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
    with open_study(wb, task, metric, batch_size=batch_size, memory=memory) as study:
        circuit.check_model(study.graph)
        study.measure_baselines()
        sizes = [int(f * n) for f in several]
        choices, kept = [], []
        unscored = torch.tensor([head_of(name) is None for name in circuit.graph.senders]) & circuit.node_scores.isnan()
        for absolute in (True, False):
            for size in sizes:
                one = circuit.top(size, absolute=absolute)
                choices.append(one.edges_in if circuit.level == "edge" else one.senders_in | unscored)
                kept.append(one.n_edges if circuit.level == "edge" else size)
        choices.append(torch.zeros_like(choices[0]) if circuit.level == "edge" else unscored)
        values = run_choices(study, torch.stack(choices), ablation, progress)
        return FaithfulnessCurve(
            circuit=repr(circuit), task=task.name, metric=study.metric.name, ablation=ablation, level=circuit.level,
            fractions=several, sizes=tuple(sizes), kept_absolute=tuple(kept[: len(sizes)]),
            kept_signed=tuple(kept[len(sizes) :]), examples=values[:-1].view(2, len(sizes), -1), full=study.clean,
            none=values[-1], provenance=study.provenance(),
        )  # fmt: skip


def area(x: Sequence[float], y: Sequence[float]) -> float:
    """Area under straight lines between points, linear in x.

    >>> area([0.0, 0.5, 1.0], [0.0, 1.0, 1.0])
    0.75
    """
    if len(x) != len(y):
        raise WorkbenchError(f"{len(x)} and {len(y)} numbers are no points")
    return sum((b - a) * (u + v) / 2 for a, b, u, v in zip(x, x[1:], y, y[1:], strict=False))
