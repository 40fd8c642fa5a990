"""How far greedy pruning has come: what it keeps in a file, and what tells one pruning from another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.analysis.circuits.engine.setup import Setup
from workbench.analysis.circuits.model.graph import Graph
from workbench.errors import FormatError
from workbench.storage.result import Result
from workbench.sweep.inputs import check_resumed

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Pruning(Result):
    """Edges that greedy pruning (ACDC) has tried, whole or interrupted. `find_circuit(…, resume=path)` goes on from it.

    Attributes:
        model: facts of the model's graph.
        kept: [sender, receiver] bool, the edges that are not left out so far.
        scores: [sender, receiver], by how much leaving an edge out harmed the task when it was tried, as a share of
            clean minus corrupted; NaN where it was not, or could not matter.
        place: how many edges are decided, from the logits back.
        present: mean of the metric with `kept`. scale: see `Setup.scale`.
        identity: what a file must share to be gone on from.
    """

    form = "workbench.pruning"

    model: dict[str, Any]
    kept: Bool[Tensor, "sender receiver"]
    scores: Float[Tensor, "sender receiver"]
    place: int
    present: float
    scale: float
    identity: dict[str, Any]
    provenance: dict[str, Any]

    def check_parts(self) -> None:
        """Raise a FormatError if the edges are not those of the model."""
        Graph.fitting(self.model, (), (self.kept, self.scores))

    @property
    def complete(self) -> bool:
        """Whether every edge has been decided."""
        return self.place == Graph.of(self.model).n_edges

    @property
    def table(self) -> pd.DataFrame:
        """One row per edge that was tried, in the order of the model."""
        import pandas as pd

        graph = Graph.of(self.model)
        tried = graph.exists & ~self.scores.isnan()
        columns = {
            "edge": graph.edge_names(tried), "score": self.scores[tried].tolist(), "kept": self.kept[tried].tolist(),
        }  # fmt: skip
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        n = Graph.of(self.model).n_edges
        done = "" if self.complete else f", {self.place} of {n} edges decided"
        return f"Pruning({int(self.kept.sum())} of {n} edges kept{done})"


class PruningInterrupted(KeyboardInterrupt):
    """Ctrl-C during greedy pruning. `partial` holds what is done; save it, and pass its path as `resume` to go on."""

    def __init__(self, partial: Pruning, path: Path | None) -> None:
        self.partial = partial
        where = f"it is in {path}" if path else "keep it with error.partial.save(path)"
        done = f"{partial.place} of {Graph.of(partial.model).n_edges} edges are decided"
        super().__init__(f"{done}; {where}, and go on with resume=path")


def start(setup: Setup, path: Path | None, **settings: Any) -> Pruning:
    """Where to begin: what a file holds if it is there, else nothing decided.

    Args:
        settings: of the pruning, for the identity.

    Raises:
        FormatError: the file is no pruning, truncated, changed, or of another model, task or settings.
    """
    graph, identity = setup.graph, setup.identity(**settings)
    if path is not None and path.exists():
        held = Pruning.load(path)
        check_resumed(held.identity, identity, path.name, "pruning")
        if held.kept.shape != graph.exists.shape:
            raise FormatError(f"{path.name} has other edges", hint="was the model's form changed? give a new file")
        return held
    return Pruning(
        model=graph.facts, kept=graph.exists.clone(),
        scores=torch.full(graph.exists.shape, torch.nan, dtype=torch.float64), place=0,
        present=float(setup.clean.mean()), scale=setup.scale, identity=identity,
        provenance=setup.provenance(),
    )  # fmt: skip
