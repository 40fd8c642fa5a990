"""How stable a circuit is over prompts, and how well its scores find a reference set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.statistics.correlation import rank_auroc
from workbench.analysis.statistics.intervals import draws, halves
from workbench.analysis.statistics.overlap import jaccard
from workbench.errors import InterventionError, expect
from workbench.storage.result import Result
from workbench.workers.engine import Engine, opened
from workbench.workers.protocol import Job

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Stability(Result):
    """How often each node or edge is in the circuit when prompts are drawn anew.

    Draws are of half as many prompts, with replacement: such a draw differs from the circuit by as much noise as the
    circuit of as many new prompts does. Since the circuit was chosen by its own noise too, `jaccard` still lies above
    what new prompts give; `halves`, of circuits that have no prompt in common and half as many each, lies below.

    Attributes:
        items: nodes or edges. frequency: [item] share of the draws in which it is in. inside: [item] bool, in the
            circuit itself. jaccard: [draw] overlap of each draw's circuit with the circuit.
        halves: [draw] overlap of two circuits from two halves of the prompts; empty of one prompt.
        unit: what was drawn: "prompts", or "groups" of them.
    """

    form = "workbench.circuit_stability"

    circuit: str
    level: str
    items: Annotated[tuple[str, ...], "item"]
    frequency: Float[Tensor, " item"]
    inside: Bool[Tensor, " item"]
    jaccard: Float[Tensor, " draw"]
    unit: str
    provenance: dict[str, Any]
    halves: Float[Tensor, " half"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @property
    def table(self) -> pd.DataFrame:
        """One row per item that is ever in, most frequent first."""
        import pandas as pd

        frame = pd.DataFrame(
            {"item": self.items, "frequency": self.frequency.tolist(), "in_circuit": self.inside.tolist()}
        )
        frame = frame[(frame["frequency"] > 0) | frame["in_circuit"]]
        return frame.sort_values("frequency", ascending=False, kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        below = f"{float(self.halves.mean()):.2f}" if len(self.halves) else "none"
        drawn = f"{float(self.jaccard.mean()):.2f} of redrawn {self.unit}"
        return f"Stability(mean Jaccard between {below} of disjoint halves and {drawn}; {self.circuit})"


def circuit_stability(
    circuit: Circuit,
    *,
    n_bootstrap: int = 200,
    groups: Sequence[object] | None = None,
    seed: int = 0,
    engine: str | Engine = "local",
) -> Stability:
    """Draw the prompts of a circuit anew, half as many, choose its nodes or edges again in the same number, and count.

    Args:
        circuit: with the scores of single examples.
        groups: one label per prompt, such as its template; whole groups of paraphrases are then drawn.
        seed: of the draws. engine: "local", "ray", or a `workbench.RayWorkers`: who chooses; for large circuits.

    Raises:
        InterventionError: the circuit kept no single scores, or there are not as many labels as prompts.
    """
    expect(Circuit, circuit=circuit)
    circuit.check_not_empty()
    n = len(circuit.single_scores)
    if groups is not None and len(groups) != n:
        raise InterventionError(f"there are {len(groups)} labels for {n} prompts")
    edges, exists = circuit.level == "edge", circuit.graph.exists
    names = tuple(circuit.graph.edges) if edges else circuit.graph.senders
    own = circuit.edges_in[exists] if edges else circuit.senders_in
    count, overlaps = torch.zeros(len(names), dtype=torch.float64), []
    chosen = partial(_chosen, circuit)
    drawn = draws(n, n_bootstrap, seed, groups, share=0.5)
    pairs = halves(n, n_bootstrap, seed, groups)
    indices = [*((one,) for one in drawn), *pairs]
    with opened(engine) as workers:
        found = [each for _, each in workers.over(Job(None, chosen, indices))]
    for (inside,) in found[: len(drawn)]:
        count += inside
        overlaps.append(jaccard(inside, own))
    apart = [jaccard(one, other) for one, other in found[len(drawn) :]]
    return Stability(
        circuit=repr(circuit), level=circuit.level, items=tuple(names), frequency=count / n_bootstrap, inside=own,
        jaccard=torch.tensor(overlaps, dtype=torch.float64), unit="prompts" if groups is None else "groups",
        provenance=circuit.provenance | {"n_bootstrap": n_bootstrap, "seed": seed},
        halves=torch.tensor(apart, dtype=torch.float64),
    )  # fmt: skip


def _chosen(circuit: Circuit, several: Sequence[Tensor]) -> list[Tensor]:
    """Of several draws of prompts [prompt], what is in the circuit that each gives."""
    redrawn = [circuit.redrawn(index) for index in several]
    edges, exists = circuit.level == "edge", circuit.graph.exists
    return [again.edges_in[exists] if edges else again.senders_in for again in redrawn]


def auroc(circuit: Circuit, reference: Circuit | Iterable[Any], *, absolute: bool = True) -> float:
    """Area under the ROC curve of a circuit's scores against a reference set: 1 where all of it is ranked first.

    Args:
        reference: another circuit of the same model; or names of edges, or of nodes (heads in any spelling). Nodes are
            ranked by their own scores, in an edge circuit by the sum over their edges.

    Raises:
        InterventionError: a reference that is empty, or holds everything that is scored.
    """
    graph = circuit.graph
    if isinstance(reference, Circuit):
        reference.check_model(graph)
        wanted: list[Any] = list(reference.edges if reference.level == "edge" else reference.nodes)
    else:
        wanted = list(reference)
    of_edges = any(isinstance(one, str) and "->" in one for one in wanted)
    scores = circuit.edge_scores if of_edges else circuit.node_scores
    real = torch.zeros(scores.shape, dtype=torch.bool)
    for one in wanted:
        if of_edges:
            real[graph.edge(one)] = True
        elif one != "logits":
            name = one if one in graph.sender_index else graph.head_name(one)
            if name in graph.sender_index:
                real[graph.sender_index[name]] = True
    known = ~scores.isnan()
    return rank_auroc(scores[known].abs() if absolute else scores[known], real[known])
