"""How far to trust a circuit: faithfulness, completeness and minimality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.engine.edges import run_edges, run_nodes
from workbench.analysis.circuits.engine.setup import Setup, open_setup
from workbench.analysis.circuits.model.names import head_of
from workbench.analysis.circuits.shares import Denominator
from workbench.analysis.statistics.intervals import bracketed, mean_t
from workbench.errors import expect
from workbench.session.workbench import Workbench
from workbench.storage.result import Result
from workbench.tasks.base import Task
from workbench.workers.engine import Engine

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Faithfulness(Result):
    """What is left of a task when everything outside of a circuit is ablated.

    Attributes:
        circuit: its short description. task, metric, ablation: names. higher_is_better: of the metric.
        alone: [example] of the metric with the circuit alone. full, none: with the whole model, and with all ablated.
        without: [subset, example] of the whole model with only a subset of the circuit ablated; `alone_without`: of
            the circuit alone without that subset too. subsets: their nodes. Empty unless completeness was asked for.
        minus_one: [node, example] of the circuit alone without one node; `members`: those nodes. Empty unless
            minimality was asked for.
    """

    form = "workbench.faithfulness"
    filled: ClassVar = ("example",)

    circuit: str
    task: str
    metric: str
    ablation: str
    alone: Float[Tensor, " example"]
    full: Float[Tensor, " example"]
    none: Float[Tensor, " example"]
    subsets: Annotated[tuple[tuple[str, ...], ...], "subset _"]
    without: Float[Tensor, "subset example"]
    alone_without: Float[Tensor, "subset example"]
    members: Annotated[tuple[str, ...], "member"]
    minus_one: Float[Tensor, "member example"]
    provenance: dict[str, Any]
    higher_is_better: bool = True

    @property
    def value(self) -> float:
        """(m(circuit) − m(nothing)) / (m(model) − m(nothing)); 1 is perfect, and it can lie above.

        It means nothing where the `denominator` may be 0 or is negative.
        """
        return float((self.alone.mean() - self.none.mean()) / self.denominator.value)

    @property
    def denominator(self) -> Denominator:
        """m(model) − m(nothing), its interval, and whether it is surely on the good side of 0."""
        return Denominator.of(self.full, self.none, 1 if self.higher_is_better else -1)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `value` over prompts (Fieller's); NaN where the share is undefined, or of one prompt."""
        return self._interval(self.alone - self.none)

    @property
    def lost(self) -> tuple[float, float, float]:
        """m(model) − m(circuit) in the metric's unit, and the ends of its 95 % t interval over prompts."""
        return float((self.full - self.alone).mean()), *mean_t(self.full - self.alone)

    @property
    def incompleteness(self) -> list[float]:
        """|F(circuit without K) − F(model without K)| for each subset K, as a share; 0 is complete."""
        return ((self.alone_without.mean(-1) - self.without.mean(-1)) / self.denominator.value).abs().tolist()

    @property
    def minimality(self) -> dict[str, float]:
        """By how much the circuit alone falls when one node is left out, as a share; near 0: it is not needed."""
        falls = (self.alone.mean() - self.minus_one.mean(-1)) / self.denominator.value
        fall = falls.tolist() if self.members else []
        return dict(zip(self.members, fall, strict=True))

    def _interval(self, differences: Tensor, absolute: bool = False) -> tuple[float, float]:
        """95 % interval over prompts of the mean of [example] differences, as a share."""
        low, high = self.denominator.interval(differences, self.full, self.none)
        if not absolute:
            return low, high
        return 0.0 if low < 0 < high else min(abs(low), abs(high)), max(abs(low), abs(high))

    @property
    def table(self) -> pd.DataFrame:
        """One row per quantity, all shares, with 95 % intervals over prompts; all NaN where no share is defined."""
        import pandas as pd

        rows = [("faithfulness", "", self.value, *self.interval)]
        changes = zip(self.subsets, self.incompleteness, self.alone_without - self.without, strict=True)
        rows += [("incompleteness", " ".join(k), v, *self._interval(d, absolute=True)) for k, v, d in changes]
        falls = zip(self.minimality.items(), self.alone - self.minus_one, strict=False)
        rows += [("minimality", node, v, *self._interval(d)) for (node, v), d in falls]
        frame = pd.DataFrame(rows, columns=["quantity", "of", "value", "low", "high"])
        return frame if self.denominator.defined else frame.assign(value=float("nan"))

    @property
    def in_metric(self) -> pd.DataFrame:
        """The metric itself of the whole model, the circuit alone, and with all ablated, with 95 % t intervals."""
        import pandas as pd

        several = {"whole model": self.full, "circuit alone": self.alone, "all ablated": self.none}
        rows = [(name, float(values.mean()), *mean_t(values)) for name, values in several.items()]
        return pd.DataFrame(rows, columns=["of", "value", "low", "high"])

    def __repr__(self) -> str:
        low, high = self.interval
        share = f"{self.value:.3f} {bracketed(low, high, '.3f')}"
        share = share if self.denominator.defined else f"share undefined: {self.denominator}"
        value, least, most = self.lost
        lost = f"{value:.3g} {bracketed(least, most)}"
        return f"Faithfulness({share}, lost {lost} of {self.metric}, {self.ablation}; {self.circuit})"


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
    engine: str | Engine = "local",
    progress: bool = True,
) -> Faithfulness:
    """Keep a circuit, ablate everything else, and measure the task.

    Args:
        wb: the model. circuit: of this model; its edges where it was chosen by edges, else its nodes.
        task: the circuit's or another.
        ablation: what replaces the rest: "counterfactual" (the twin), "zero", "mean", "mean_positional" or
            "resample".
        metric: a name or a function, as in `find_circuit`.
        n_subsets: random halves of the circuit to test its completeness with (Wang et al. 2211.00593).
        minimality: leave out each node in turn.
        keep_mlps: whether a circuit of nodes keeps all MLPs, and the input; by default where it has none itself.
        seed: of the subsets, and of "resample".
        engine: "local", "ray", or a `workbench.RayWorkers`: who runs the batches.

    Raises:
        InterventionError: an empty circuit, or one of another model. TaskError: bad prompts or metric.

    Warns:
        UserWarning: m(model) − m(nothing) may be 0 or is negative, so that no share is defined.
    """
    expect(Workbench, wb=wb)
    expect(Circuit, circuit=circuit)
    expect(Task, task=task)
    circuit.check_not_empty()
    with open_setup(wb, task, metric, batch_size=batch_size, memory=memory, seed=seed, engine=engine) as setup:
        circuit.check_model(setup.graph)
        setup.measure_baselines()
        kept, members = kept_and_members(circuit, keep_mlps)
        nothing = torch.zeros_like(kept) if kept.dim() == 2 else _without(circuit, kept, members)
        generator = torch.Generator().manual_seed(seed)
        subsets = []
        for _ in range(n_subsets):
            order = torch.randperm(len(members), generator=generator).tolist()
            subsets.append(tuple(members[i] for i in sorted(order[: max(1, len(members) // 2)])))
        everything = torch.ones_like(kept) if kept.dim() == 1 else setup.graph.exists
        choices = [kept, nothing]
        choices += [_without(circuit, everything, k) for k in subsets]
        choices += [_without(circuit, kept, k) for k in subsets]
        choices += [_without(circuit, kept, (node,)) for node in members if minimality]
        values = run_choices(setup, torch.stack(choices), ablation, progress)
        n = len(subsets)
        found = Faithfulness(
            circuit=repr(circuit), task=task.name, metric=setup.metric.name, ablation=ablation,
            higher_is_better=setup.metric.higher_is_better,
            alone=values[0], full=setup.clean, none=values[1], subsets=tuple(subsets),
            without=values[2 : 2 + n], alone_without=values[2 + n : 2 + 2 * n],
            members=tuple(members) if minimality else (), minus_one=values[2 + 2 * n :],
            provenance=setup.provenance() | {"circuit": circuit.provenance.get("task", {})},
        )  # fmt: skip
    found.denominator.warn(f"the faithfulness of {found.metric}")
    return found


def kept_and_members(circuit: Circuit, keep_mlps: bool | None) -> tuple[Tensor, list[str]]:
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


def run_choices(setup: Setup, choices: Tensor, ablation: str, progress: bool) -> Tensor:
    """[choice, example] of the metric, for choices of nodes [choice, sender] or edges [choice, sender, receiver]."""
    run = run_nodes if choices.dim() == 2 else run_edges
    return run(setup, choices, ablation, progress, "keeping circuits")


def _without(circuit: Circuit, kept: Tensor, left_out: Sequence[str]) -> Tensor:
    """What is kept when the output of some nodes is left out."""
    made = kept.clone()
    for name in left_out:
        made[circuit.graph.sender_index[name]] = False
    return made
