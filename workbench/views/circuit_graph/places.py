"""Where the nodes of a model's graph stand in a picture: what each is, its layer, its number, which heads it feeds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.names import head_of, label

_SHORT = 6  # letters that fit on a node


@dataclass(frozen=True)
class Place:
    """One node of a graph.

    Attributes:
        name: as the graph has it. label: as interventions take it. short: what fits on the node.
        kind: "input", "head", "mlp", "kv" (what several heads read together: keys and values, or all of it), or
            "logits".
        layer: −1 for an input, the number of layers for the logits.
        number: of the head, or the middle of a kv group's heads; 0 for others.
        feeds: of a kv group the senders that compute with it.
        raised: an MLP that reads what the heads of its layer write.
    """

    name: str
    label: str
    short: str
    kind: str
    layer: int
    number: float = 0.0
    feeds: tuple[str, ...] = ()
    raised: bool = False


def places_of(graph: Graph) -> tuple[Place, ...]:
    """Places of all nodes, in the order of `Graph.nodes`."""
    columns = columns_of(graph)
    first_head: dict[int, int] = {}
    for i, sender in enumerate(graph.senders):
        if head_of(sender) is not None:
            first_head.setdefault(graph.layer_of(sender), i)
    found = []
    for name in graph.nodes:
        layer, said = graph.layer_of(name), label(name)
        short = said if len(said) <= _SHORT else said.rpartition(".")[2]
        head = head_of(name)
        kind, number, raised = "mlp", 0.0, False
        feeds: tuple[str, ...] = ()
        if name not in graph.sender_index:
            fed = graph.feeds[:, columns[name]].any(1).nonzero()[:, 0].tolist()
            feeds = tuple(graph.senders[i] for i in fed)
            numbers = [each[1] for each in map(head_of, feeds) if each is not None]
            kind, number = ("kv", sum(numbers) / len(numbers)) if numbers else ("logits", 0.0)
        elif not bool(graph.feeds[graph.sender_index[name]].any()):
            kind = "input"
        elif head is not None:
            kind, number = "head", float(head[1])
        else:
            own = first_head.get(layer)
            raised = own is not None and bool(graph.exists[own, columns[name]].any())
        found.append(Place(name, said, short, kind, layer, number, feeds, raised))
    return tuple(found)


def columns_of(graph: Graph) -> dict[str, list[int]]:
    """For each node the indices of its receivers: q, k and v of a head."""
    found: dict[str, list[int]] = defaultdict(list)
    for i, receiver in enumerate(graph.receivers):
        found[node_of(receiver)].append(i)
    return found


def node_of(receiver: str) -> str:
    """The node that a receiver belongs to.

    >>> node_of("a9.h6<q>"), node_of("logits")
    ('a9.h6', 'logits')
    """
    return receiver.partition("<")[0]


def part_of(receiver: str) -> str:
    """What a receiver is of its node: q, k, v, or nothing.

    >>> part_of("a9.h6<q>"), part_of("logits")
    ('q', '')
    """
    return receiver.partition("<")[2].rstrip(">")


def rows_of(graph: Graph) -> list[str]:
    """What the layers are called: the label of a head without its number."""
    found = [f"layer {i}" for i in range(len(graph.layers))]
    for name in graph.senders:
        head = head_of(name)
        if head is not None:
            found[graph.layer_of(name)] = label(name).removesuffix(f"H{head[1]}").rstrip(".")
    return found
