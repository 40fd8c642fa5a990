"""`Circuit`: the nodes and edges that carry a task, their scores, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.analysis.circuits import mib
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.names import head_of, label
from workbench.errors import InterventionError, WorkbenchError
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd


class _Stage(TypedDict):
    name: str
    receivers: tuple[str, ...]
    importance: Float[Tensor, " sender"]
    chosen: tuple[str, ...]


class _Settings(TypedDict, total=False):
    completeness_gap: float | None


@dataclass(frozen=True, repr=False)
class Circuit(Result):
    """Which nodes and edges of a model carry a task.

    Attributes:
        model: facts of the model's graph; see `graph`.
        task, method, metric: names.
        direction: "noising" (the twin's activations are put into the prompt's run) or "denoising" (the reverse).
        sign: what a positive score means, in a sentence.
        level: "node" or "edge", at which the circuit was chosen.
        senders_in: [sender] bool. edges_in: [sender, receiver] bool.
        node_scores: [sender], NaN where a node was not scored; of edge methods the sum of |score| over its outgoing
            edges, in the circuit or not.
        edge_scores: [sender, receiver], NaN where there is no edge or it was not scored.
        threshold: how the choice was made: "kind" and "value".
        stages: of path patching, one dict each: name, receivers, positions, importance [sender], chosen.
        examples: [example, scored item] for intervals, or None: senders of "node" circuits (of path patching, stages
            one after another), edges of "edge" circuits in the order of `Graph.edges`.
        clean, corrupted: [example] of the metric on prompts and twins.
        settings: arguments of the method. provenance: model, task, versions.
    """

    form = "workbench.circuit"

    model: dict[str, Any]
    task: str
    method: str
    metric: str
    direction: str
    sign: str
    level: str
    senders_in: Bool[Tensor, " sender"]
    edges_in: Bool[Tensor, "sender receiver"]
    node_scores: Float[Tensor, " sender"]
    edge_scores: Float[Tensor, "sender receiver"]
    threshold: dict[str, Any]
    stages: tuple[Annotated[dict[str, Any], _Stage], ...]
    examples: Float[Tensor, "example item"] | None
    clean: Float[Tensor, " example"]
    corrupted: Float[Tensor, " example"]
    settings: Annotated[dict[str, Any], _Settings]
    provenance: dict[str, Any]

    def check_parts(self) -> None:
        """Raise a FormatError if nodes and edges are not those of the model."""
        Graph.fitting(self.model, (self.senders_in, self.node_scores), (self.edges_in, self.edge_scores))

    @cached_property
    def graph(self) -> Graph:
        """Senders, receivers and edges of the model."""
        return Graph.of(self.model)

    def _with(self, **parts: Any) -> Circuit:
        """The circuit with other parts, of the same model: its graph is not read and checked again."""
        again = replace(self, **parts)
        again.__dict__["graph"] = self.graph
        return again

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes in the circuit, in the order of the model."""
        graph = self.graph
        chosen = {graph.senders[i] for i in self.senders_in.nonzero()[:, 0].tolist()}
        return graph.sort({*chosen, *graph.nodes_of(self.edges_in)})

    @property
    def heads(self) -> tuple[str, ...]:
        """Labels of the query heads in the circuit, such as "L9H6"."""
        return tuple(label(name) for name in self.nodes if head_of(name) is not None)

    @property
    def edges(self) -> tuple[str, ...]:
        """Names of the edges in the circuit, such as "a0.h1->a9.h9<q>"."""
        return tuple(self.graph.edge_names(self.edges_in))

    @property
    def n_edges(self) -> int:
        """How many edges are in the circuit."""
        return int(self.edges_in.sum())

    def score_of(self, name: str) -> float:
        """Score of a node or edge, NaN if it has none.

        Raises:
            InterventionError, FormatError: the model has no such node or edge.
        """
        if "->" in name:
            return float(self.edge_scores[self.graph.edge(name)])
        node = self.graph.head_name(name) if name not in self.graph.sender_index else name
        if node not in self.graph.sender_index:
            raise InterventionError(f"{name!r} sends nothing, so it has no score")
        return float(self.node_scores[self.graph.sender_index[node]])

    @property
    def table(self) -> pd.DataFrame:
        """One row per scored edge, or node where nodes were scored, highest magnitude first."""
        import pandas as pd

        graph, rows = self.graph, []
        if self.level == "edge":
            for s, r in (~self.edge_scores.isnan()).nonzero().tolist():
                sender, receiver = graph.senders[s], graph.receivers[r]
                score = float(self.edge_scores[s, r])
                rows.append((f"{sender}->{receiver}", sender, receiver, score, bool(self.edges_in[s, r])))
            frame = pd.DataFrame(rows, columns=["edge", "sender", "receiver", "score", "in_circuit"])
        else:
            for stage in self.stages or ({"name": self.method, "importance": self.node_scores, "chosen": self.nodes},):
                for i, score in enumerate(stage["importance"].tolist()):
                    if score == score:  # scored in this stage
                        name = graph.senders[i]
                        rows.append((stage["name"], name, graph.layer_of(name), score, name in stage["chosen"]))
            frame = pd.DataFrame(rows, columns=["stage", "node", "layer", "score", "in_circuit"])
        return frame.sort_values("score", key=abs, ascending=False, kind="stable").reset_index(drop=True)

    def top(self, n: int | float, *, absolute: bool = True, prune: bool = True) -> Circuit:
        """The circuit of the highest scores.

        Args:
            n: how many edges or nodes; or, as a float from 0 to 1, a share of all that are scored, so that 1 is one and
                1.0 is all of them.
            absolute: by magnitude rather than by signed score. Of equal scores the earlier in the model comes first,
                where MIB leaves it to the sorting.
            prune: of edges, drop those that lie on no path from the input to the logits.

        Raises:
            InterventionError: more than there are, or less than none; a float above 1.
        """
        scores = self.edge_scores if self.level == "edge" else self.node_scores
        scored = int((~scores.isnan()).sum())
        if isinstance(n, bool) or (isinstance(n, float) and not 0 <= n <= 1):
            raise InterventionError(f"a share of all scores lies between 0 and 1, not {n}", hint="a number is an int")
        wanted = int(n * scored) if isinstance(n, float) else int(n)
        if not 0 <= wanted <= scored:
            raise InterventionError(f"a circuit of {n} cannot be cut out of {scored} scores")
        order = (
            (scores.abs() if absolute else scores)
            .nan_to_num(-torch.inf)
            .flatten()
            .argsort(descending=True, stable=True)
        )
        chosen = torch.zeros(scores.numel(), dtype=torch.bool)
        chosen[order[:wanted]] = True
        threshold = {"kind": "top", "value": wanted, "absolute": absolute, "pruned": prune and self.level == "edge"}
        if self.level == "edge":
            edges = chosen.view(scores.shape)
            return self.with_edges(self.graph.pruned(edges) if prune else edges & self.graph.exists, threshold)
        return self._with(senders_in=chosen, edges_in=torch.zeros_like(self.edges_in), threshold=threshold)

    def above(self, value: float, *, absolute: bool = True, prune: bool = True) -> Circuit:
        """The circuit of all scores of at least `value`."""
        scores = (self.edge_scores if self.level == "edge" else self.node_scores).nan_to_num(-torch.inf)
        scores = scores.abs().where(scores.isfinite(), scores) if absolute else scores
        found = self.top(int((scores >= value).sum()), absolute=absolute, prune=prune)
        return replace(found, threshold={"kind": "value", "value": value, "absolute": absolute, "pruned": prune})

    def with_edges(self, edges: Tensor, threshold: dict[str, Any] | None = None) -> Circuit:
        """The same scores with other edges in the circuit, [sender, receiver] bool."""
        if edges.shape != self.edges_in.shape:
            raise WorkbenchError("edges are [sender, receiver]", shape=edges.shape)
        given = {"kind": "given", "value": None} if threshold is None else threshold
        return self._with(edges_in=edges, senders_in=edges.any(1), threshold=given)

    def with_nodes(self, nodes: Sequence[Any]) -> Circuit:
        """The same scores with other heads or nodes in the circuit; edges are left out."""
        chosen = torch.zeros_like(self.senders_in)
        for node in nodes:
            name = node if node in self.graph.sender_index else self.graph.head_name(node)
            chosen[self.graph.sender_index[name]] = True
        return replace(
            self, level="node", senders_in=chosen, edges_in=torch.zeros_like(self.edges_in),
            threshold={"kind": "given", "value": None}, stages=(),
        )  # fmt: skip

    @property
    def single_scores(self) -> Tensor:
        """`examples`.

        Raises:
            InterventionError: they were not kept.
        """
        if self.examples is None:
            raise InterventionError(
                "the circuit kept no scores of single prompts",
                hint='"acdc" has none, and of very large graphs they are not kept; find it on fewer prompts',
            )
        return self.examples

    def redrawn(self, index: Tensor) -> Circuit:
        """The circuit chosen again by the same rule, from the scores of some of its prompts.

        Of path patching the receivers of each stage stay what they were.

        Args:
            index: [n] numbers of examples, with repetition where they are drawn so.

        Raises:
            InterventionError: the circuit kept no scores of single prompts.
        """
        mean, graph = self.single_scores[index].double().mean(0), self.graph
        rule, absolute = self.threshold, bool(self.threshold.get("absolute", True))
        if self.level == "edge":
            scores = torch.full_like(self.edge_scores, torch.nan)
            scores[graph.exists] = mean
            again = self._with(edge_scores=scores, node_scores=scores.nan_to_num(0.0).abs().sum(1))
            pruned = bool(rule.get("pruned", True))
            if rule.get("kind") == "value":
                return again.above(rule["value"], absolute=absolute, prune=pruned)
            n = int(rule["value"]) if rule.get("kind") == "top" else self.n_edges
            return again.top(n, absolute=absolute, prune=pruned)
        rows = mean.view(-1, len(graph.senders))  # of path patching one for each stage
        largest = rows.gather(0, rows.nan_to_num(0.0).abs().argmax(0)[None])[0]
        if not self.stages:
            return self._with(node_scores=largest).top(int(self.senders_in.sum()), absolute=absolute)
        stages, inside, edges = [], torch.zeros_like(self.senders_in), torch.zeros_like(self.edges_in)
        for stage, row in zip(self.stages, rows, strict=True):
            chosen = self._with(node_scores=row).top(len(stage["chosen"]), absolute=absolute).senders_in
            inside |= chosen
            for name in stage["receivers"]:
                edges[:, graph.receiver_index[name]] |= chosen & graph.exists[:, graph.receiver_index[name]]
            names = tuple(graph.senders[i] for i in chosen.nonzero()[:, 0].tolist())
            stages.append({**stage, "importance": row, "chosen": names})
        return self._with(senders_in=inside, edges_in=edges, node_scores=largest, stages=tuple(stages))

    @property
    def members(self) -> Tensor:
        """[sender] bool: the senders among `nodes`, those that only receive included."""
        graph = self.graph
        receiving = torch.zeros_like(self.senders_in)
        read = self.edges_in.any(0).tolist()
        for name, column in graph.receiver_index.items():
            row = graph.sender_index.get(name.partition("<")[0])
            if row is not None and read[column]:
                receiving[row] = True
        return self.senders_in | self.edges_in.any(1) | receiving

    def check_model(self, graph: Graph) -> None:
        """Refuse a model with another graph.

        Raises:
            InterventionError: says in what they differ.
        """
        differ = _difference(self.graph, graph)
        if differ:
            raise InterventionError(f"the circuit is of another model: {differ}")

    def check_not_empty(self) -> None:
        """Refuse a circuit without nodes and edges."""
        if not bool(self.senders_in.any()) and not bool(self.edges_in.any()):
            raise InterventionError("the circuit is empty", hint="choose a lower threshold, or circuit.top(n)")

    def to_mib(self, path: str | Path, *, grouped: bool = False) -> Path:
        """Write MIB's JSON: `cfg`, `nodes` and `edges`, each with score and `in_graph`.

        Args:
            grouped: where heads share keys and values, write one edge for each group, as this package has them. MIB's
                own code cannot read that; by default each head has one, with an equal share of the group's score.

        Raises:
            WorkbenchError: there is no such folder, or the layers differ in their heads.
        """
        return mib.write(path, self.graph, self.senders_in, self.edges_in, self.node_scores, self.edge_scores, grouped)

    @classmethod
    def from_mib(cls, path: str | Path, like: Any = None) -> Circuit:
        """Read MIB's JSON.

        Args:
            like: a Workbench's circuit or `Graph` whose model the file must be of; without one, the file's own `cfg`
                says what the model is. Where heads share keys, edges into each head's k or v are summed over the group.

        Raises:
            FormatError: no such file, or that of another model.
        """
        graph = like.graph if isinstance(like, Circuit) else like
        found = mib.read(path, graph)
        empty = torch.zeros(0, dtype=torch.float64)
        return cls(
            model=found.graph.facts, task="", method="read from a file", metric="", direction="", sign="as in the file",
            level="edge", senders_in=found.senders_in, edges_in=found.edges_in, node_scores=found.node_scores,
            edge_scores=found.edge_scores, threshold={"kind": "file", "value": None}, stages=(), examples=None,
            clean=empty, corrupted=empty, settings={}, provenance={"file": Path(path).name},
        )  # fmt: skip

    def __repr__(self) -> str:
        heads = ", ".join(self.heads[:8]) + (" …" if len(self.heads) > 8 else "")
        edges = f", {self.n_edges} of {self.graph.n_edges} edges" if self.level == "edge" else ""
        precision = str(self.provenance.get("precision", ""))
        coarse = f", in {precision}" if "16" in precision else ""
        gap = self.settings.get("completeness_gap") if self.method == "eap_ig" else None
        missed = "" if gap is None else f"; sums miss {gap:.0%} of the metric's change"
        nodes = f"{len(self.nodes)} nodes{edges}{coarse}"
        return f"Circuit({self.task or '?'} by {self.method}: {nodes}; {heads or 'no heads'}{missed})"


def _difference(a: Graph, b: Graph) -> str:
    """In what two graphs differ; "" if they are equal."""
    if len(a.layers) != len(b.layers):
        return f"{len(a.layers)} and {len(b.layers)} layers"
    for i, (one, two) in enumerate(zip(a.layers, b.layers, strict=True)):
        if one != two:
            return f"layer {i} is {one} and {two}"
    return "" if a.d_model == b.d_model else f"d_model {a.d_model} and {b.d_model}"
