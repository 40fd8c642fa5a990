"""What a step of training takes on many devices, with attention where its tokens are, and where a plan has moved it.

A model of time, not a measurement: linear layers by their operations, attention by its pairs of tokens, in tiles of
rows, transfers by their bytes. With ping-pong two halves of a batch take turns: one computes while the other's tensors
travel, so that a device takes the longer of the two. What a document that is cut over devices sends without a plan is
not counted, to the advantage of attention that stays where its tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workbench.kernels.disaggregation.items import Item, Sizes, packed
from workbench.kernels.disaggregation.planner import Plan, plan


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder: layers, width of the stream and of the MLP, and of its attention."""

    layers: int = 32
    d_model: int = 4096
    d_mlp: int = 14336
    attention: Sizes = field(default_factory=Sizes)

    @property
    def linear_operations(self) -> float:
        """For a token and a layer, forward: of projections and a gated MLP."""
        sizes = self.attention
        projections = self.d_model * sizes.width * (2 * sizes.heads + 2 * sizes.kv_heads)
        return 2.0 * (projections + 3 * self.d_model * self.d_mlp)

    @property
    def pair_operations(self) -> float:
        """For a pair of tokens and a layer, forward: of scores and of what they weight."""
        return 4.0 * self.attention.heads * self.attention.width


@dataclass(frozen=True)
class Devices:
    """How many there are, operations and bytes of one in a second, and rows that its kernel computes at once."""

    n: int = 512
    operations: float = 4e14
    n_bytes: float = 5e10
    rows: int = 128


@dataclass(frozen=True)
class Simulated:
    """Seconds of a step forward, in all layers.

    Attributes:
        plan: who computes what. together: with attention where its tokens are: all wait for the slowest.
        moved: with the plan, transfers and computing one after the other. hidden: with transfers behind computing.
        linear: of it, what linear layers take. transfers: of it, the longest of a device.
    """

    plan: Plan
    together: float
    moved: float
    hidden: float
    linear: float
    transfers: float

    @property
    def speedup(self) -> float:
        """Of the plan, with transfers hidden, over attention where its tokens are."""
        return self.together / self.hidden


def simulate(
    lengths: Sequence[int],
    model: Model | None = None,
    devices: Devices | None = None,
    *,
    budget: int | None = None,
    tolerance: float = 0.1,
) -> Simulated:
    """A step of documents that are packed onto devices, with and without a plan.

    Args:
        lengths: tokens of the documents of one batch. budget: tokens of a device, as of `packed`.
        tolerance: as of `plan`.

    Raises:
        CaptureError: as of `packed` and `plan`.

    >>> found = simulate([65536] + [2048] * 32, devices=Devices(n=2), budget=65536)
    >>> found.speedup > 1.2
    True
    """
    model, devices = model or Model(), devices or Devices()
    placed = packed(lengths, devices.n, budget)
    made = plan(placed, model.attention, tolerance)
    tokens = [sum(item.n_rows for item in items) for items in placed]
    linear = [model.layers * n * model.linear_operations / devices.operations for n in tokens]
    at_home = [_attention(items, model, devices) for items in placed]
    elsewhere = [_attention(items, model, devices) for items in made.items]
    sent = [model.layers * n / devices.n_bytes for n in made.traffic]
    together = max(a + b for a, b in zip(linear, at_home, strict=True))
    computing = [a + b for a, b in zip(linear, elsewhere, strict=True)]
    moved = max(a + b for a, b in zip(computing, sent, strict=True))
    hidden = max(map(max, zip(computing, sent, strict=True)))
    return Simulated(made, together, moved, hidden, max(linear), max(sent))


def _attention(items: Sequence[Item], model: Model, devices: Devices) -> float:
    """Seconds of the attention of some items in all layers: rows in whole tiles, each with the keys of its last."""
    pairs = 0.0
    for item in items:
        for rows in item.ranges:
            tiles = -(-len(rows) // devices.rows)
            padding = tiles * devices.rows / len(rows)
            pairs += padding * sum((rows.start + 1, rows.stop)) * len(rows) / 2
    return model.layers * pairs * model.pair_operations / devices.operations
