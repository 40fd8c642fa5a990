"""A gate as a map: a factor on what stands at each position, and nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_finite
from workbench.kernels.history import own
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern
from workbench.kernels.patterns.base import MagnitudePattern
from workbench.kernels.streaming import Denominators


class GatePattern(Pattern):
    """A[h, i, i] = g[h, i], and zero elsewhere: y = g · u, where u are the values.

    The heads are what has a factor of its own: the channels, or all of them as one head. Other positions can only have
    a part in how large g is; where it is known which, a map of that stands beside this one.

    Args:
        gates: g, [batch, head, position], of either sign; [batch, head, 1] where all positions have the same.
        n: positions.
        values: u, [batch, head, position, width], kept for `value_weighted`; optional.

    Attributes:
        over: along what the factor may differ: "position", "channel", both or neither.

    Raises:
        CaptureError: gates of another shape, or not finite.

    >>> GatePattern(torch.tensor([[[2.0, -1.0]]]), 2).dense()[0, 0].tolist()
    [[2.0, 0.0], [0.0, -1.0]]
    """

    normalised = False
    position_axes: ClassVar[Mapping[str, int]] = {"gates": 2, "values": 2}

    def __init__(self, gates: Tensor, n: int, *, values: Tensor | None = None) -> None:
        if gates.dim() != 3 or gates.shape[2] not in (1, n) or not gates.is_floating_point():
            raise CaptureError(f"gates must be [batch, head, {n} or 1 position], floating point", shape=gates.shape)
        check_finite("gates", gates)
        dtype = torch.float64 if gates.dtype == torch.float64 else torch.float32
        super().__init__((*gates.shape[:2], n, n), Mask(n, n, window=1), dtype, gates.device)
        self._gates = own(gates)
        self.signed = bool((self._gates.detach() < 0).any())
        self.values = None if values is None else own(values)

    @property
    def gates(self) -> Tensor:  # type: ignore[override]
        """g, [batch, head, position]."""
        return self._gates.expand(-1, -1, self.n_queries)

    @property
    def over(self) -> tuple[str, ...]:
        """Along what the factor may differ."""
        along = {"position": self._gates.shape[2] > 1, "channel": self.n_heads > 1}
        return tuple(name for name, differs in along.items() if differs)

    @property
    def row_sum(self) -> Tensor:
        """[batch, head, position] of g."""
        return self.gates.to(self.dtype)

    def magnitude(self, key_weights: Tensor | None = None) -> MagnitudePattern:
        """|A|, times [batch, head, position] weights if given, normalised per row; its sums are known."""
        made, sums = MagnitudePattern(self, key_weights), self.row_sum
        sums = sums if key_weights is None else sums * key_weights
        made.found_denominators(Denominators(sums.abs(), sums))
        return made

    def ungated(self, values: Tensor) -> Tensor:
        """u: the values themselves, [batch, head, position, width]."""
        return self._checked_values(values)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """How many positions there are; the gates, and the values where they are kept."""
        held = {"gates": self._gates, "values": self.values}
        return {"n": self.n_queries}, {name: t for name, t in held.items() if t is not None}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> GatePattern:
        """The pattern from its `state`."""
        return cls(tensors["gates"], facts["n"], values=tensors.get("values"))

    def then(self, later: Sequence[Pattern]) -> Pattern:
        """The gate over these positions and later ones."""
        wide = [GatePattern(one.gates, one.n_queries, values=one.values) for one in (self, *later)
                if isinstance(one, GatePattern)]  # fmt: skip
        if len(wide) <= len(later) or len({one.shape[:2] for one in wide}) > 1:
            raise CaptureError("kind, batch or heads of a gate differ between steps")
        return super(GatePattern, wide[0]).then(wide[1:])

    def _joined_facts(self, later: Sequence[Pattern]) -> dict[str, Any]:
        return {"n": self.n_queries + sum(each.n_queries for each in later)}

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A."""
        which = range(self.n_heads) if heads is None else self._checked(heads)
        return self.tile_of(slice(None), queries, keys, which)

    def tile_of(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        """[b, h, q, k] for these batch entries."""
        gates = self.gates[batch][:, list(heads)].to(self.dtype)
        out = gates.new_zeros(*gates.shape[:2], queries.stop - queries.start, keys.stop - keys.start)
        first = max(queries.start, keys.start)
        here = torch.arange(first, max(first, min(queries.stop, keys.stop)), device=self.device)
        out[..., here - queries.start, here - keys.start] = gates[..., here]
        return out

    def apply(self, values: Tensor) -> Tensor:
        """g · u, [batch, head, position, width]."""
        return self._checked_values(values) * self.gates[..., None].to(self.dtype)


def gate_map(u: Tensor, g: Tensor, *, channels: int = -1) -> tuple[GatePattern, Tensor]:
    """The map of a product u · g, and its values: u with channels as heads, or all in one head if they share g.

    Args:
        u: what is multiplied, [batch, ..., channel], with any number of axes of positions.
        g: the factor, which broadcasts to u and has as many axes.
        channels: the axis of channels; 1 for images [batch, channel, row, column].

    Returns:
        The pattern, and values [batch, head, position, width] of it: positions of several axes lie row by row.

    Raises:
        CaptureError: shapes that do not fit.

    >>> u = torch.ones(2, 5, 3)
    >>> [gate_map(u, torch.ones(shape))[0].over for shape in ((2, 5, 1), (2, 1, 3), (1, 5, 3))]
    [('position',), ('channel',), ('position', 'channel')]
    """
    fits = u.dim() >= 2 and g.dim() == u.dim() and u.numel() > 0
    if not fits or any(a not in (1, b) for a, b in zip(g.shape, u.shape, strict=True)):
        raise CaptureError(
            f"a factor {list(g.shape)} does not broadcast to {list(u.shape)}",
            hint="it has as many axes as what it multiplies, each as long or 1",
        )
    u, g = u.movedim(channels, 1), g.movedim(channels, 1)
    everywhere = all(size == 1 for size in g.shape[2:])
    gates = g.expand(len(u), g.shape[1], *((1,) * (u.dim() - 2) if everywhere else u.shape[2:]))
    gates, values = (t.reshape(*t.shape[:2], -1) for t in (gates, u))  # [batch, channel, position]
    one_head = g.shape[1] == 1 < u.shape[1]
    values = values.transpose(1, 2)[:, None] if one_head else values[..., None]
    return GatePattern(gates, values.shape[2], values=values), values
