"""What the graph of a model is made of: its layers, and the spots in them that names stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Layer:
    """An attention, and the MLP behind it if there is one.

    Attributes:
        n_heads, n_kv_heads: of the attention. mlp: whether there is one.
        parallel: the MLP reads what the heads read, not what they write.
        kind: "self", "cross" where keys and values are read from the end of the stream before this one, or "state", a
            recurrence in a block that has attention too.
        mixer: all heads read the stream as one receiver, "x".
        beside: the heads read what those of the layer before read, not what they write: both are in one block.
        stream: the residual stream that it writes to, "encoder" or "decoder"; "" where there is only one.
    """

    n_heads: int
    n_kv_heads: int
    mlp: bool = True
    parallel: bool = False
    kind: str = "self"
    stream: str = ""
    mixer: bool = False
    beside: bool = False

    @property
    def n_senders(self) -> int:
        """Heads, and the MLP."""
        return self.n_heads + self.mlp


class Spot(NamedTuple):
    """What a name stands for.

    Attributes:
        layer: index among the graph's layers; −1 for an input, the number of layers for the logits.
        what: "input", "head", "group", "mixer", "mlp" or "logits".
        number: of the head or kv group.
        part: "q", "k" or "v" of a receiver that is a part of a head or group, "x" of a mixer's.
        stream: index of the residual stream that a sender writes to, or a receiver reads.
    """

    layer: int
    what: str
    number: int = 0
    part: str = ""
    stream: int = 0
