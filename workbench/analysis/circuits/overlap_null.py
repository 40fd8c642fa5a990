"""What two circuits would share by chance: with one circuit's heads renamed, and with its nodes' degrees alone kept.

Circuits cluster by node, so that edges drawn one by one share too little to compare with. Renaming a circuit's heads at
random within their layers keeps its whole shape, and commutes with dropping edges that lead nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.statistics.overlap import jaccard
from workbench.analysis.statistics.p_values import among_draws

FEW_RENAMINGS = 20  # below this many different ones, no p-value is small
_CHUNK = 1 << 22  # numbers held at once
_FIT_STEPS = 200


@dataclass(frozen=True)
class Renamings:
    """Random renamings of a graph's heads within their layers.

    Query heads that share keys move with their group, and within it. Inputs, MLPs and the logits keep their names.

    Attributes:
        senders: [draw, sender] the sender whose place each takes. receivers: [draw, receiver].
    """

    graph: Graph
    senders: Tensor
    receivers: Tensor

    @classmethod
    def draw(cls, graph: Graph, n: int, seed: int) -> Renamings:
        """`n` renamings, each as likely as any other."""
        generator = torch.Generator().manual_seed(seed)

        def shuffled(*shape: int) -> Tensor:
            return torch.rand(n, *shape, generator=generator).argsort(-1)

        senders = torch.arange(len(graph.senders)).repeat(n, 1)
        receivers = torch.arange(len(graph.receivers)).repeat(n, 1)
        for i, layer in enumerate(graph.layers):
            size = layer.n_heads // layer.n_kv_heads
            groups = shuffled(layer.n_kv_heads)
            within = shuffled(layer.n_kv_heads, size)  # [draw, new group, new place]
            heads = (groups[:, :, None] * size + within).flatten(1)
            first = graph.first_sender(i)
            senders[:, first : first + layer.n_heads] = first + heads
            for part in "" if layer.mixer else "qkv":
                columns = graph.columns(i, part)
                receivers[:, columns.start : columns.stop] = columns.start + (heads if part == "q" else groups)
        return cls(graph, senders, receivers)

    @property
    def n_different(self) -> float:
        """How many different renamings the graph has."""
        each = [
            math.factorial(layer.n_kv_heads) * math.factorial(layer.n_heads // layer.n_kv_heads) ** layer.n_kv_heads
            for layer in self.graph.layers
        ]
        return float(math.prod(each))

    def of_senders(self, items: Tensor) -> Iterator[Tensor]:
        """[draw, item] the place among `items` [item] (indices of senders) that each takes, in chunks of draws."""
        place = torch.full((len(self.graph.senders),), -1)
        place[items] = torch.arange(len(items))
        yield place[self.senders[:, items]]

    def of_edges(self) -> Iterator[Tensor]:
        """[draw, edge] the edge whose place each takes, in the order of `Graph.edges`, in chunks of draws."""
        exists = self.graph.exists
        place = torch.full(exists.shape, -1)
        place[exists] = torch.arange(int(exists.sum()))
        s, r = exists.nonzero().T
        step = max(1, _CHUNK // max(1, len(s)))
        for senders, receivers in zip(self.senders.split(step), self.receivers.split(step), strict=True):
            yield place[senders[:, s], receivers[:, r]]


def beyond_degrees(a: Tensor, b: Tensor, graph: Graph, n: int, seed: int) -> float:
    """How often random edges that follow the degrees of the nodes share as many: the larger p of two directions.

    Either circuit in turn is drawn anew from the edges' probabilities x_s · y_r / (1 + x_s · y_r), fitted so that each
    sender and receiver has as many edges as in the circuit, in the mean, and compared with the other.

    Args:
        a, b: [sender, receiver] bool.
    """
    return max(_one_direction(a, b, graph, n, seed), _one_direction(b, a, graph, n, seed + 1))


def _one_direction(kept: Tensor, drawn: Tensor, graph: Graph, n: int, seed: int) -> float:
    exists = graph.exists
    chances = fitted_to_degrees(drawn, exists)[exists]
    mine, own = kept[exists], jaccard(kept[exists], drawn[exists])
    generator = torch.Generator().manual_seed(seed)
    step, found = max(1, _CHUNK // max(1, len(mine))), []
    for first in range(0, n, step):
        size = min(step, n - first)
        some = torch.rand(size, len(mine), generator=generator, dtype=torch.float64) < chances
        shared = (some & mine).sum(1).double()
        union = some.sum(1) + int(mine.sum()) - shared
        found.append(torch.where(union > 0, shared / union.clamp_min(1), 1.0))
    return among_draws(torch.cat(found), own)


def fitted_to_degrees(edges: Tensor, exists: Tensor) -> Tensor:
    """[sender, receiver] probability of each edge, such that nodes have the degrees of `edges` in the mean.

    >>> exists = torch.ones(3, 3, dtype=torch.bool)
    >>> fitted_to_degrees(torch.eye(3).bool(), exists).sum(1).round(decimals=3).tolist()
    [1.0, 1.0, 1.0]
    """
    # In NumPy, whose hundreds of steps over small tables take a third of the time.
    possible = exists.double().numpy()
    out, into = edges.sum(1).double().numpy(), edges.sum(0).double().numpy()
    x, y = out / possible.sum(1).clip(1), into / possible.sum(0).clip(1)
    for _ in range(_FIT_STEPS):
        before = x
        x = _factors(out, (possible / (1 + x[:, None] * y)) @ y)
        y = _factors(into, x @ (possible / (1 + x[:, None] * y)))
        if (abs(x - before) <= 1e-9 * (1 + before)).all():
            break
    product = x[:, None] * y
    return torch.from_numpy(possible * product / (1 + product))


def _factors(degrees: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """[node] by which each has its degree; a node of all edges has a very large one."""
    return np.where(degrees > 0, degrees / sums.clip(1e-300), 0.0).clip(max=1e12)
