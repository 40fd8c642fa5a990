"""Patterns that are held whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.masks import Mask
from workbench.kernels.patterns.base import Pattern


class DensePattern(Pattern):
    """A pattern that is held whole, for weights that a model computed itself, and for tests.

    Args:
        weights: [batch, head, query, key], at least zero.
        mask: what may be seen; all of it if None.
        normalised: whether rows sum to one. Statistics are those of the weights as they are, also where they do not.
    """

    def __init__(self, weights: Tensor, mask: Mask | None = None, normalised: bool = True) -> None:
        if weights.dim() != 4 or not weights.is_floating_point():
            raise CaptureError(
                f"weights must be [batch, head, query, key] in floating point, not {weights.dtype}", shape=weights.shape
            )
        dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
        mask = mask or Mask(weights.shape[-2], weights.shape[-1])
        super().__init__(weights.shape, mask, dtype, weights.device)
        if not isinstance(normalised, bool):
            raise CaptureError(f"normalised is True or False, not {normalised!r}")
        self.weights, self.normalised = weights, normalised

    @classmethod
    def of(
        cls, weights: Tensor, mask: Mask | None = None, *, normalised: bool = True, signed: bool | None = None
    ) -> DensePattern:
        """A `SignedPattern` of weights that may be negative, else a `DensePattern`.

        Args:
            signed: whether they may; if None, whether some are.
        """
        if bool((weights < 0).any()) if signed is None else signed:
            return SignedPattern(weights, mask)
        return DensePattern(weights, mask, normalised)

    @property
    def by_magnitude(self) -> bool:
        """False: what a row lacks of one means something."""
        return False

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The weights, and the rules of the mask."""
        facts, tensors = self.mask.state()
        held = tensors if self.values is None else tensors | {"values": self.values}
        return {"mask": facts, "normalised": self.normalised}, {"weights": self.weights} | held

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> DensePattern:
        """The pattern from its `state`."""
        pattern = cls(tensors["weights"], Mask.rebuild(facts["mask"], tensors), facts["normalised"])
        pattern.values = tensors.get("values")
        return pattern

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of the stored weights."""
        part = self.weights if heads is None else self.weights[:, list(heads)]
        return part[:, :, queries, keys].to(self.dtype)


class SignedPattern(DensePattern):
    """A map that is held whole, whose entries may have either sign: statistics are those of |A| normalised per row."""

    signed = True

    def __init__(self, weights: Tensor, mask: Mask | None = None, normalised: bool = False) -> None:
        super().__init__(weights, mask, normalised)

    @property
    def by_magnitude(self) -> bool:
        """True."""
        return True
