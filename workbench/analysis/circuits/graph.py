"""The graph of a model: who writes to the residual stream, who reads from it, and which edges there are between them.

Senders are the input (the embeddings), query heads and MLPs. Receivers are the queries of heads, the keys and values of
kv groups, the inputs of MLPs, and the logits. Names are those of MIB and EAP-IG: `input`, `a9.h6`, `m3`, `logits`,
`a9.h6<q>`; where several heads share keys and values, these belong to the group: `a9.kv2<k>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench.errors import FormatError, InterventionError, nearest

_LABEL = re.compile(r"L(\d+)(H|KV)(\d+)")
_NODE = re.compile(r"a(\d+)\.(h|kv)(\d+)(?:<([qkv])>)?|m(\d+)")


@dataclass(frozen=True)
class Layer:
    """What one block of the model is made of.

    Attributes:
        n_heads, n_kv_heads: of its attention. mlp: whether it has one.
        parallel: the MLP reads what the heads of its block read, not what they write.
    """

    n_heads: int
    n_kv_heads: int
    mlp: bool = True
    parallel: bool = False

    @property
    def n_senders(self) -> int:
        """Heads, and the MLP."""
        return self.n_heads + self.mlp


@dataclass(frozen=True)
class Graph:
    """Senders and receivers of a model of these layers, in the order in which they write and read.

    >>> graph = Graph((Layer(2, 1), Layer(2, 1)), d_model=8)
    >>> graph.senders
    ('input', 'a0.h0', 'a0.h1', 'm0', 'a1.h0', 'a1.h1', 'm1')
    >>> graph.receivers[:5]
    ('a0.h0<q>', 'a0.h1<q>', 'a0.kv0<k>', 'a0.kv0<v>', 'm0')
    >>> len(graph.edges), Graph.gpt2(12, 12, 768).n_edges
    (36, 32491)
    """

    layers: tuple[Layer, ...]
    d_model: int

    @classmethod
    def gpt2(cls, n_layers: int, n_heads: int, d_model: int) -> Graph:
        """The graph of a model in which no heads share keys."""
        return cls((Layer(n_heads, n_heads),) * n_layers, d_model)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Graph:
        """The inverse of `facts`."""
        return cls(tuple(Layer(**layer) for layer in facts["layers"]), facts["d_model"])

    @property
    def facts(self) -> dict[str, Any]:
        """The graph as plain values."""
        return {"layers": [asdict(layer) for layer in self.layers], "d_model": self.d_model}

    @cached_property
    def senders(self) -> tuple[str, ...]:
        """Names of all that write to the residual stream, in the order in which they do."""
        names = ["input"]
        for i, layer in enumerate(self.layers):
            names += [f"a{i}.h{head}" for head in range(layer.n_heads)]
            names += [f"m{i}"] if layer.mlp else []
        return tuple(names)

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """Names of all that read the residual stream."""
        return (*(name for i in range(len(self.layers)) for name in self.receivers_of(i)), "logits")

    def receivers_of(self, i: int) -> tuple[str, ...]:
        """Receivers of one layer: q of each head, k and v of each group, the MLP."""
        layer = self.layers[i]
        kind = "h" if layer.n_kv_heads == layer.n_heads else "kv"
        names = [f"a{i}.h{head}<q>" for head in range(layer.n_heads)]
        names += [f"a{i}.{kind}{group}<{part}>" for part in "kv" for group in range(layer.n_kv_heads)]
        return tuple(names + ([f"m{i}"] if layer.mlp else []))

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """All nodes: senders, kv groups that are shared, and the logits."""
        groups = [name.partition("<")[0] for name in self.receivers if ".kv" in name and name.endswith("<k>")]
        return (*self.senders, *groups, "logits")

    @cached_property
    def sender_index(self) -> dict[str, int]:
        """Index of each sender."""
        return {name: i for i, name in enumerate(self.senders)}

    @cached_property
    def receiver_index(self) -> dict[str, int]:
        """Index of each receiver."""
        return {name: i for i, name in enumerate(self.receivers)}

    def before(self, i: int) -> int:
        """How many senders write before layer i."""
        return 1 + sum(layer.n_senders for layer in self.layers[:i])

    @cached_property
    def reads(self) -> tuple[int, ...]:
        """For each receiver how many of the first senders it reads."""
        counts: list[int] = []
        for i, layer in enumerate(self.layers):
            before = self.before(i)
            counts += [before] * (layer.n_heads + 2 * layer.n_kv_heads)
            counts += [before if layer.parallel else before + layer.n_heads] if layer.mlp else []
        return (*counts, len(self.senders))

    @cached_property
    def exists(self) -> Tensor:
        """[sender, receiver] bool: whether there is such an edge."""
        return torch.arange(len(self.senders))[:, None] < torch.tensor(self.reads)

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return sum(self.reads)

    @property
    def edges(self) -> list[str]:
        """Names of all edges, such as `a0.h1->a9.h9<q>`, senders first."""
        return self.edge_names(self.exists)

    def edge_names(self, chosen: Tensor) -> list[str]:
        """Names of the edges of a [sender, receiver] bool."""
        return [f"{self.senders[s]}->{self.receivers[r]}" for s, r in chosen.nonzero().tolist()]

    @cached_property
    def feeds(self) -> Tensor:
        """[sender, receiver] bool: whether the sender computes with what the receiver reads."""
        feeds = torch.zeros(len(self.senders), len(self.receivers), dtype=torch.bool)
        for i, layer in enumerate(self.layers):
            size = layer.n_heads // layer.n_kv_heads
            for name in self.receivers_of(i):
                column = self.receiver_index[name]
                if name == f"m{i}":
                    feeds[self.sender_index[name], column] = True
                    continue
                number = int(re.findall(r"\d+", name)[1])
                heads = [number] if name.endswith("<q>") else range(number * size, (number + 1) * size)
                for head in heads:
                    feeds[self.sender_index[f"a{i}.h{head}"], column] = True
        return feeds

    def heads(self) -> list[tuple[int, int]]:
        """(layer, head) of all query heads."""
        return [(i, head) for i, layer in enumerate(self.layers) for head in range(layer.n_heads)]

    def head_name(self, head: Any) -> str:
        """The node of a head given as (layer, head), "L9H6", "9.6" or "a9.h6".

        Raises:
            InterventionError: there is none.
        """
        if isinstance(head, tuple) and len(head) == 2:
            name = f"a{head[0]}.h{head[1]}"
        else:
            text = str(head)
            label = _LABEL.fullmatch(text)
            dotted = re.fullmatch(r"(\d+)\.(\d+)", text)
            name = text
            if label is not None:
                name = f"a{label[1]}.{'h' if label[2] == 'H' else 'kv'}{label[3]}"
            elif dotted is not None:
                name = f"a{dotted[1]}.h{dotted[2]}"
        if name not in self.nodes:
            raise InterventionError(f"the model has no node {head!r}", hint=nearest(name, self.nodes, "node"))
        return name

    def receiver(self, head: Any, part: str) -> str:
        """The receiver that holds the q, k or v of a head; for shared k and v that of its group.

        Raises:
            InterventionError: no such head or part.
        """
        name = self.head_name(head)
        if part not in ("q", "k", "v"):
            raise InterventionError(f"a head has q, k and v, not {part!r}")
        found = _NODE.fullmatch(name)
        if found is None or found[1] is None:
            raise InterventionError(f"{name} is no head")
        i, number = int(found[1]), int(found[3])
        layer = self.layers[i]
        if found[2] == "h" and part != "q" and layer.n_kv_heads != layer.n_heads:
            name = f"a{i}.kv{number // (layer.n_heads // layer.n_kv_heads)}"
        return f"{name}<{part}>"

    def layer_of(self, name: str) -> int:
        """Layer of a sender or receiver: −1 for the input, the number of layers for the logits."""
        if name == "input":
            return -1
        if name == "logits":
            return len(self.layers)
        found = _NODE.fullmatch(name)
        if found is None:
            raise FormatError(f"{name!r} is no node", hint="nodes are input, a9.h6, a9.kv2, m3 and logits")
        return int(found[1] or found[5])

    def edge(self, name: str) -> tuple[int, int]:
        """Indices of the sender and receiver of an edge.

        Raises:
            FormatError: the model has no such edge.
        """
        source, arrow, target = name.partition("->")
        if not arrow or source not in self.sender_index or target not in self.receiver_index:
            raise FormatError(f"the model has no edge {name!r}", hint="edges are named like a0.h1->a9.h9<q>")
        s, r = self.sender_index[source], self.receiver_index[target]
        if not bool(self.exists[s, r]):
            raise FormatError(f"there is no edge {name!r}: the receiver comes before the sender")
        return s, r

    def pruned(self, chosen: Tensor) -> Tensor:
        """[sender, receiver] bool without the edges that lead nowhere or come from nowhere.

        What remains lies on a path from the input to the logits, as in MIB.
        """
        chosen = chosen & self.exists
        while True:
            out = chosen.any(1)
            into = (self.feeds & chosen.any(0)).any(1)
            into[0] = True
            alive = out & into
            reading = (self.feeds & alive[:, None]).any(0)
            reading[-1] = True
            kept = chosen & alive[:, None] & reading
            if bool((kept == chosen).all()):
                return kept
            chosen = kept

    def nodes_of(self, chosen: Tensor) -> tuple[str, ...]:
        """Nodes at the ends of the edges of a [sender, receiver] bool, in the order of `nodes`."""
        ends = {self.senders[i] for i in chosen.any(1).nonzero()[:, 0].tolist()}
        ends |= {self.receivers[i].partition("<")[0] for i in chosen.any(0).nonzero()[:, 0].tolist()}
        return tuple(name for name in self.nodes if name in ends)

    def sort(self, names: Iterable[str]) -> tuple[str, ...]:
        """Nodes in the order of the model, each once."""
        wanted = set(names)
        return tuple(name for name in self.nodes if name in wanted)


def label(name: str) -> str:
    """A head node as the label that interventions take: L9H6; other names as they are.

    >>> label("a9.h6"), label("a9.kv2<k>"), label("m3")
    ('L9H6', 'L9KV2<k>', 'm3')
    """
    return re.sub(r"^a(\d+)\.(h|kv)(\d+)", lambda m: f"L{m[1]}{m[2].upper()}{m[3]}", name)


def head_of(name: str) -> tuple[int, int] | None:
    """(layer, head) of a query head's node, else None."""
    found = re.fullmatch(r"a(\d+)\.h(\d+)", name)
    return (int(found[1]), int(found[2])) if found else None


def same_graph(a: Graph, b: Graph) -> str:
    """In what two graphs differ; "" if they are equal."""
    if len(a.layers) != len(b.layers):
        return f"{len(a.layers)} and {len(b.layers)} layers"
    for i, (one, two) in enumerate(zip(a.layers, b.layers, strict=True)):
        if one != two:
            return f"layer {i} is {one} and {two}"
    return "" if a.d_model == b.d_model else f"d_model {a.d_model} and {b.d_model}"
