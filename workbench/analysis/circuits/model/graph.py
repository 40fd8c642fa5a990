"""The graph of a model: who writes to the residual stream, who reads from it, and which edges there are between them.

Senders are the input (the embeddings), query heads and MLPs. Receivers are the queries of heads, the keys and values of
kv groups, the inputs of MLPs, and the logits. Names are those of MIB and EAP-IG: `input`, `a9.h6`, `m3`, `logits`,
`a9.h6<q>`; where several heads share keys and values, these belong to the group: `a9.kv2<k>`.

The heads of a recurrence, or of an attention with a gate, read the stream through one door: what they compute with (and
what decays, gates and short convolutions are made of) is one receiver for all of them, `a3<x>`.

An encoder-decoder has two streams, and their names stand before those of the nodes: `encoder.a0.h1`, `decoder.m2`. A
block of the decoder is two layers here: its own attention, `decoder.a0`, and its cross-attention, `decoder.x0`, whose
queries read the decoder's stream, and whose keys and values read what the encoder's stream is in the end.

A block in which a recurrence and attention read the stream beside each other (Falcon-H1) is two layers too,
`blocks.s0<x>` and `blocks.a0`: neither reads what the other writes, and the MLP behind them reads both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.circuits.model.names import label
from workbench.analysis.circuits.model.nodes import Layer, Spot
from workbench.errors import FormatError, InterventionError, nearest
from workbench.storage import typed
from workbench.storage.parts import Part

_LABEL = re.compile(r"L(\d+)(H|KV)(\d+)")
_DOTTED = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True)
class Graph:
    """Senders and receivers of a model of these layers, in the order in which they write and read.

    The layers of one stream follow each other, and those of an encoder come first.

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
        """The inverse of `facts`. Circuits of one model share a graph, and what it has worked out.

        Raises:
            FormatError: they are no facts of a graph.
        """
        told = Part(facts, "the graph")
        layers = tuple(typed.record(layer, Layer) for layer in told["layers"].list())
        for layer in layers:
            if not 1 <= layer.n_kv_heads <= layer.n_heads or layer.n_heads % layer.n_kv_heads:
                raise FormatError(f"{layer.n_heads} heads cannot share {layer.n_kv_heads} keys and values")
        if not layers:
            raise FormatError("the graph has no layers")
        return _shared(layers, told["d_model"].integer(1))

    @classmethod
    def fitting(cls, facts: Mapping[str, Any], senders: Sequence[Tensor], edges: Sequence[Tensor]) -> Graph:
        """The graph of facts from a file, if tensors from the same file are [sender] and [sender, receiver] of it.

        Raises:
            FormatError: they are not.
        """
        layers = [typed.record(layer, Layer) for layer in Part(facts, "the graph")["layers"].list()]
        told = sum(max(layer.n_senders, 1) for layer in layers)
        held = max(len(each) for each in (*senders, *edges) if each.dim())
        # Before it is made: a graph takes memory by the square of what its facts say.
        if told > held:
            raise FormatError(f"the graph tells of {told:,} heads and MLPs, the scores of {held:,}")
        graph = cls.of(facts)
        shape = (len(graph.senders), len(graph.receivers))
        if any(tuple(each.shape) != shape[:1] for each in senders) or any(tuple(each.shape) != shape for each in edges):
            raise FormatError(f"the scores do not fit a graph of {shape[0]:,} senders and {shape[1]:,} receivers")
        return graph

    @property
    def facts(self) -> dict[str, Any]:
        """The graph as plain values."""
        return {"layers": [asdict(layer) for layer in self.layers], "d_model": self.d_model}

    @cached_property
    def streams(self) -> tuple[str, ...]:
        """Names of the residual streams, in the order in which they run; the last one goes to the logits."""
        return tuple(dict.fromkeys(layer.stream for layer in self.layers))

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """For each layer the number of its block in its stream: what is beside the layer before is in its block."""
        numbers: list[int] = []
        for i, layer in enumerate(self.layers):
            before = self.layers[i - 1] if i else None
            if before is None or before.stream != layer.stream:
                numbers.append(0)
            else:
                same = layer.beside or (layer.kind == "cross" and before.kind != "cross")
                numbers.append(numbers[-1] + (not same))
        return tuple(numbers)

    @cached_property
    def prefixes(self) -> tuple[str, ...]:
        """What stands before the names of each stream's nodes: "", or such as "encoder."."""
        return tuple(f"{stream}." if stream else "" for stream in self.streams)

    def stream_of(self, i: int) -> int:
        """Index of the stream that layer i writes to."""
        return self.streams.index(self.layers[i].stream)

    @cached_property
    def _senders(self) -> dict[str, Spot]:
        found: dict[str, Spot] = {}
        for i, layer in enumerate(self.layers):
            stream, prefix = self.stream_of(i), self.prefixes[self.stream_of(i)]
            found.setdefault(f"{prefix}input", Spot(-1, "input", stream=stream))
            for head in range(layer.n_heads):
                found[f"{self.attention(i)}.h{head}"] = Spot(i, "head", head, stream=stream)
            if layer.mlp:
                found[f"{prefix}m{self.blocks[i]}"] = Spot(i, "mlp", stream=stream)
        return found

    @cached_property
    def _receivers(self) -> dict[str, Spot]:
        found: dict[str, Spot] = {}
        for i, layer in enumerate(self.layers):
            own = self.stream_of(i)
            other = own - 1 if layer.kind == "cross" else own
            shared = layer.n_kv_heads != layer.n_heads
            if layer.mixer:
                found[f"{self.attention(i)}<x>"] = Spot(i, "mixer", 0, "x", own)
            for head in range(0 if layer.mixer else layer.n_heads):
                found[f"{self.attention(i)}.h{head}<q>"] = Spot(i, "head", head, "q", own)
            for part in "" if layer.mixer else "kv":
                for group in range(layer.n_kv_heads):
                    name = f"{self.attention(i)}.{'kv' if shared else 'h'}{group}<{part}>"
                    found[name] = Spot(i, "group" if shared else "head", group, part, other)
            if layer.mlp:
                found[f"{self.prefixes[own]}m{self.blocks[i]}"] = Spot(i, "mlp", stream=own)
        found["logits"] = Spot(len(self.layers), "logits", stream=len(self.streams) - 1)
        return found

    def attention(self, i: int) -> str:
        """Name of the attention of layer i: "a3", "decoder.x0" or "blocks.s2"."""
        letter = {"cross": "x", "state": "s"}.get(self.layers[i].kind, "a")
        return f"{self.prefixes[self.stream_of(i)]}{letter}{self.blocks[i]}"

    @cached_property
    def senders(self) -> tuple[str, ...]:
        """Names of all that write to a residual stream, in the order in which they do."""
        return tuple(self._senders)

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """All that read a residual stream: q of each head, k and v of each group (or x), the MLP, layer by layer."""
        return tuple(self._receivers)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """All nodes: senders, kv groups that are shared, what mixers read, and the logits."""
        read = {("group", "k"), ("mixer", "x")}
        groups = [name[:-3] for name, spot in self._receivers.items() if (spot.what, spot.part) in read]
        return (*self.senders, *groups, "logits")

    @cached_property
    def sender_index(self) -> dict[str, int]:
        """Index of each sender."""
        return {name: i for i, name in enumerate(self.senders)}

    @cached_property
    def receiver_index(self) -> dict[str, int]:
        """Index of each receiver."""
        return {name: i for i, name in enumerate(self.receivers)}

    def sender(self, name: str) -> Spot:
        """What a sender's name stands for.

        Raises:
            InterventionError: it is none.
        """
        if name not in self._senders:
            raise InterventionError(f"{name!r} is no sender", hint=nearest(name, self.senders, "sender"))
        return self._senders[name]

    def receiver_spot(self, name: str) -> Spot:
        """What a receiver's name stands for.

        Raises:
            InterventionError: it is none.
        """
        if name not in self._receivers:
            raise InterventionError(f"{name!r} is no receiver", hint=nearest(name, self.receivers, "receiver"))
        return self._receivers[name]

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """Index among the senders of each stream's input."""
        return tuple(self.sender_index[f"{prefix}input"] for prefix in self.prefixes)

    def first_sender(self, i: int) -> int:
        """Index of the first sender of layer i."""
        return self.sender_index[f"{self.attention(i)}.h0"]

    def columns(self, i: int, what: str) -> range:
        """Indices of the receivers of layer i that are "q", "k", "v", "x", or "mlp"; none where it has none."""
        layer, name = self.layers[i], self.attention(i)
        first = self.receiver_index[f"{name}<x>" if layer.mixer else f"{name}.h0<q>"]
        heads, groups = (0, 0) if layer.mixer else (layer.n_heads, layer.n_kv_heads)
        sizes = {"q": heads, "k": groups, "v": groups, "x": int(layer.mixer), "mlp": int(layer.mlp)}
        for name, size in sizes.items():
            if name == what:
                return range(first, first + size)
            first += size
        raise InterventionError(f"a layer has q, k, v, x and mlp, not {what!r}")

    @cached_property
    def reads(self) -> tuple[range, ...]:
        """For each receiver the indices of the senders that it reads."""
        ends = (*self.inputs[1:], len(self.senders))
        found: list[range] = []
        for name, spot in self._receivers.items():
            first = self.inputs[spot.stream]
            if name == "logits" or (spot.part in ("k", "v") and self.layers[spot.layer].kind == "cross"):
                found.append(range(first, ends[spot.stream]))
                continue
            layer = self.layers[spot.layer]
            if spot.what == "mlp" and not layer.parallel:
                found.append(range(first, self.first_sender(spot.layer) + layer.n_heads))
            else:
                found.append(range(first, self.first_sender(spot.layer - layer.beside)))
        return tuple(found)

    @cached_property
    def exists(self) -> Tensor:
        """[sender, receiver] bool: whether there is such an edge."""
        found = torch.zeros(len(self.senders), len(self.receivers), dtype=torch.bool)
        for column, reads in enumerate(self.reads):
            found[reads.start : reads.stop, column] = True
        return found

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return sum(map(len, self.reads))

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
        for column, (name, spot) in enumerate(self._receivers.items()):
            if spot.what == "mlp":
                feeds[self.sender_index[name], column] = True
            elif spot.what != "logits":
                layer = self.layers[spot.layer]
                size = {"q": 1, "x": layer.n_heads}.get(spot.part, layer.n_heads // layer.n_kv_heads)
                first = self.first_sender(spot.layer) + spot.number * size
                feeds[first : first + size, column] = True
        return feeds

    def heads(self) -> list[tuple[int, int]]:
        """(index of the layer, head) of all query heads."""
        return [(i, head) for i, layer in enumerate(self.layers) for head in range(layer.n_heads)]

    @cached_property
    def head_names(self) -> tuple[str, ...]:
        """Names of all query heads, in the order of `heads`."""
        return tuple(name for name, spot in self._senders.items() if spot.what == "head")

    def head_name(self, head: Any) -> str:
        """The node of a head given as (layer, head), "L9H6", "9.6" or "a9.h6".

        With several streams a site stands for the layer: ("decoder.0.cross_attn", 1), "decoder.0.cross_attn.H1".

        Raises:
            InterventionError: there is none, or it could be one of several.
        """
        several = any(self.streams)
        name = text = str(head)
        if isinstance(head, tuple) and len(head) == 2:
            name = f"{head[0]}.H{head[1]}" if isinstance(head[0], str) else f"a{head[0]}.h{head[1]}"
        elif found := _LABEL.fullmatch(text):
            name = f"a{found[1]}.{found[2].lower()}{found[3]}"
        elif found := _DOTTED.fullmatch(text):
            name = f"a{found[1]}.h{found[2]}"
        if several:
            by_label = {label(node): node for node in self.nodes}
            by_label |= {text.replace(".attn.", ".self_attn."): node for text, node in by_label.items()}
            name = by_label.get(name, name)
        if name not in self.nodes:
            hint = nearest(name, [*map(label, self.nodes)] if several else self.nodes, "node")
            raise InterventionError(f"the model has no node {head!r}", hint=hint)
        return name

    def receiver(self, head: Any, part: str) -> str:
        """The receiver that holds the q, k or v of a head; for shared k and v that of its group, of a mixer its "x".

        Raises:
            InterventionError: no such head or part.
        """
        name = self.head_name(head)
        if part not in ("q", "k", "v", "x"):
            raise InterventionError(f"a head has q, k and v, or x, not {part!r}")
        spot = self._senders.get(name)
        if spot is not None and spot.what == "head" and self.layers[spot.layer].mixer:
            name, part = self.attention(spot.layer), "x"
        elif spot is not None and spot.what == "head" and part != "q":
            layer = self.layers[spot.layer]
            if layer.n_kv_heads != layer.n_heads:
                name = f"{self.attention(spot.layer)}.kv{spot.number // (layer.n_heads // layer.n_kv_heads)}"
        if f"{name}<{part}>" not in self._receivers:
            group = spot is None and name != "logits"
            raise InterventionError(f"{name} has no {part}" if group else f"{name} is no head")
        return f"{name}<{part}>"

    def layer_of(self, name: str) -> int:
        """Index of the layer of a sender, receiver or node: −1 for an input, the number of layers for the logits.

        Raises:
            FormatError: the model has none of that name.
        """
        for known in (name, f"{name}<k>", f"{name}<x>"):
            for spots in (self._senders, self._receivers):
                if known in spots:
                    return spots[known].layer
        raise FormatError(f"{name!r} is no node", hint=f"nodes are {', '.join(self.nodes[:3])} … and logits")

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
            raise FormatError(f"there is no edge {name!r}: the receiver does not read what the sender writes")
        return s, r

    def pruned(self, chosen: Tensor) -> Tensor:
        """[sender, receiver] bool without the edges that lead nowhere or come from nowhere.

        What remains lies on a path from an input to the logits, as in MIB.
        """
        chosen = chosen & self.exists
        while True:
            out = chosen.any(1)
            into = (self.feeds & chosen.any(0)).any(1)
            into[list(self.inputs)] = True
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


@lru_cache(maxsize=8)
def _shared(layers: tuple[Layer, ...], d_model: int) -> Graph:
    return Graph(layers, d_model)
