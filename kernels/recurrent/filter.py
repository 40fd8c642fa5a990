"""The map of a short causal convolution, a filter for each channel: what stands in the place of attention in LFM2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_finite
from workbench.kernels.history import own
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern


class FilterPattern(Pattern):
    """A[i, j] = w[i − j] for 0 ≤ i − j < size: the Toeplitz map of a causal filter; the channels are the heads.

    It is the same for every input. Entries have either sign and rows do not sum to one: statistics are those of |A|
    normalised per row.

    Args:
        weight: [channel, size], as a causal convolution holds it: the last is that of the position itself.
        n_batch, n: sizes of the map.
        padding: [batch, position], True where there is none but padding, which is hidden from all; optional.
        values: [batch, channel, position, width], kept for `value_weighted`; optional.

    Raises:
        CaptureError: sizes that do not fit, weights that are not finite.

    >>> FilterPattern(torch.tensor([[1.0, 2.0]]), 1, 3).dense()[0, 0].tolist()
    [[2.0, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, 1.0, 2.0]]
    """

    signed = True
    normalised = False
    position_axes: ClassVar[Mapping[str, int]] = {"padding": 1, "values": 2}

    def __init__(
        self, weight: Tensor, n_batch: int, n: int, *, padding: Tensor | None = None, values: Tensor | None = None
    ) -> None:
        if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[1] == 0:
            raise CaptureError("weight must be [channel, size], floating point", shape=weight.shape)
        if padding is not None and (padding.shape != (n_batch, n) or padding.dtype != torch.bool):
            raise CaptureError(f"padding must be bool [batch {n_batch}, position {n}]", shape=padding.shape)
        check_finite("weight", weight)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        seen = None if padding is None else ~padding[:, None, None]
        mask = Mask(n, n, causal=True, window=weight.shape[1], tensor=seen)
        super().__init__((n_batch, weight.shape[0], n, n), mask, dtype, weight.device)
        self.weight, self.padding = own(weight), padding
        self.values = None if values is None else own(values)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The sizes; the weight, and padding and values where there are any."""
        held = {"weight": self.weight, "padding": self.padding, "values": self.values}
        facts = {"n_batch": self.n_batch, "n": self.n_keys}
        return facts, {name: t for name, t in held.items() if t is not None}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> FilterPattern:
        """The pattern from its `state`."""
        optional = {name: tensors.get(name) for name in ("padding", "values")}
        return cls(tensors["weight"], facts["n_batch"], facts["n"], **optional)

    def _joined_facts(self, later: Sequence[Pattern]) -> dict[str, Any]:
        if any(type(each) is not type(self) or each.n_batch != self.n_batch for each in later):
            raise CaptureError("kind or batch of a filter differ between steps")
        return {"n_batch": self.n_batch, "n": self.n_keys + sum(each.n_keys for each in later)}

    def from_state(self, state: Tensor) -> Tensor:
        """[batch, channel, query, 1] that the rows read of the values [batch, channel, size − 1] before the first one.

        >>> FilterPattern(torch.tensor([[1.0, 2.0]]), 1, 2).from_state(torch.ones(1, 1, 1)).flatten().tolist()
        [1.0, 0.0]
        """
        weight, size = self.weight.to(self.dtype), self.weight.shape[1]
        if tuple(state.shape) != (self.n_batch, self.n_heads, size - 1):
            raise CaptureError(f"a state must be [{self.n_batch}, {self.n_heads}, {size - 1}]", shape=state.shape)
        longer = F.pad(state.to(self.dtype), (0, self.n_keys))
        return F.conv1d(longer, weight[:, None], groups=len(weight))[..., None]

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A, in a fresh tensor."""
        which = list(range(self.n_heads)) if heads is None else self._checked(heads)
        weight = self.weight[torch.tensor(which, dtype=torch.long, device=self.device)].to(self.dtype)
        i = torch.arange(queries.start, queries.stop, device=self.device)[:, None]
        away = i - torch.arange(keys.start, keys.stop, device=self.device)[None]
        size = weight.shape[1]
        inside = (away >= 0) & (away < size)
        found = torch.where(inside, weight[:, (size - 1 - away).clamp(0, size - 1)], 0.0)
        whole = found.expand(self.n_batch, *found.shape)
        return whole.clone() if self.padding is None else whole * ~self.padding[:, None, None, keys]
