"""Multi-head mixing around a functional core: projections, positions, checks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.mechanisms.frame.place import Place


class Mixer(nn.Module, ABC):
    """A drop-in for self-attention, x [batch, token, d_model] to the same shape.

    A subclass says how heads mix: `mix`, the A·V that a capture shows, and `finish`, where something comes between
    that and the output projection.

    Args:
        place: where it stands.
        n_heads: of queries; those of the place if None. n_kv_heads: of keys and values; as many if None. The width of a
            head is the place's.

    Attributes:
        extra_loss: what the last forward in training adds to the loss, such as a router's balance; None for nothing.

    Raises:
        WorkbenchError: kv heads that do not divide the heads.
    """

    q: nn.Module
    k: nn.Module
    v: nn.Module

    def __init__(self, place: Place, n_heads: int | None = None, n_kv_heads: int | None = None) -> None:
        super().__init__()
        self.place = place
        self.extra_loss: Tensor | None = None
        self.n_heads = place.n_heads if n_heads is None else n_heads
        self.n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        if self.n_heads < 1 or self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise WorkbenchError(
                f"{self.n_kv_heads} kv heads do not divide {self.n_heads} heads", hint="a divisor, at least 1"
            )
        self.d_head = place.d_head
        wide, narrow = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        projections = [nn.Linear(place.d_model, width) for width in (wide, narrow, narrow)]
        self.q, self.k, self.v = projections
        self.out = nn.Linear(wide, place.d_model, bias=False)
        if place.rotary:
            for each in projections:  # a constant part of turned queries and keys tells distances apart
                nn.init.normal_(each.bias, std=0.5)
            angle = torch.arange(place.length)[:, None] * 1000.0 ** -torch.linspace(0, 1, self.d_head // 2 + 1)[:-1]
            self.register_buffer("turn", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, head, token, d]; turned where the place is rotary."""
        q, k, v = (self.split(each(x)) for each in (self.q, self.k, self.v))
        return self.turned(q), self.turned(k), v

    def split(self, t: Tensor) -> Tensor:
        """[batch, token, head · d] to [batch, head, token, d]."""
        return t.unflatten(-1, (-1, self.d_head)).transpose(1, 2)

    def turned(self, t: Tensor) -> Tensor:
        """Queries or keys [batch, head, token, d], turned by their positions where the place is rotary."""
        if not self.place.rotary:
            return t
        cos, sin = self.get_buffer("turn")[:, : t.shape[2]].to(t.dtype)
        a, b = t.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    def keep_loss(self, loss: Tensor) -> None:
        """Keep what this forward adds to the loss, in training alone."""
        self.extra_loss = loss if self.training and torch.is_grad_enabled() else None

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """A·V of each head, [batch, head, token, width]; A may depend on all but the values."""

    def finish(self, z: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """The output, [batch, token, d_model], of what the heads give."""
        y: Tensor = self.out(z.transpose(1, 2).flatten(2))
        return y

    def check(self, x: Tensor) -> None:
        """Raise a WorkbenchError unless x fits the place."""
        self.place.check(x)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, token, d_model] to the same shape."""
        self.check(x)
        q, k, v = self.heads(x)
        return self.finish(self.mix(q, k, v, x), v, x)
