"""Patterns of which a process holds some heads only, under the numbers that these have in the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.mask_summary import MaskSummary
from workbench.kernels.patterns.base import FAMILIES, Pattern

ELSEWHERE = "heads that other processes hold: this one has"
GATHER = "ask for these, or run cap.gathered() in every process, which gives all heads to each"


def in_whole(here: Tensor, first: int, n_heads: int, axis: int = 1) -> Tensor:
    """A tensor of some heads in one of all: those from `first` on are here, the others NaN (of integers −1).

    >>> in_whole(torch.ones(1, 2), first=1, n_heads=4)
    tensor([[nan, 1., 1., nan]])
    """
    missing = torch.nan if here.is_floating_point() else False if here.dtype == torch.bool else -1
    shape, n_here = list(here.shape), here.shape[axis]
    shape[axis] = first
    before = here.new_full(shape, missing)
    shape[axis] = n_heads - first - n_here
    return torch.cat((before, here, here.new_full(shape, missing)), dim=axis)


class PartOfHeads(Pattern):
    """A pattern of `n_heads` heads, of which those from `first` on are here.

    Args:
        here: the pattern of the heads that are here.

    What is asked of other heads is a CaptureError, and so is what is asked of all.
    """

    def __init__(self, here: Pattern, first: int, n_heads: int) -> None:
        if not 0 <= first <= n_heads - here.n_heads:
            raise CaptureError(f"{here.n_heads} heads from {first} on are none of {n_heads}", shape=here.shape)
        self.here, self.first = here, first
        self.n_batch, self.n_heads, self.n_queries, self.n_keys = here.n_batch, n_heads, here.n_queries, here.n_keys
        self.n_kv_heads = max(1, here.n_kv_heads * n_heads // here.n_heads)
        self.dtype, self.device, self._values, self.mask = here.dtype, here.device, None, here.mask
        shown = here.mask.tensor
        if shown is not None and shown.shape[1] > 1:
            shown = in_whole(shown, first, n_heads)
            hidden = shown if shown.dtype == torch.bool else shown.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
            self.mask = replace(here.mask, tensor=hidden)
        self.grade, self.signed, self.normalised = here.grade, here.signed, here.normalised

    @property
    def by_magnitude(self) -> bool:
        """As of the heads that are here."""
        return self.here.by_magnitude

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Those of the heads that are here."""
        facts, tensors = self.here.state()
        mine = {"first": self.first, "n_heads": self.n_heads, "of": type(self.here).__name__, "here": facts}
        return mine, {f"here.{name}": tensor for name, tensor in tensors.items()}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> PartOfHeads:
        """The pattern from its `state`."""
        families = FAMILIES.get(facts["of"], {})
        if len(families) != 1 or cls in families.values():
            raise CaptureError(f'there is no single pattern family "{facts["of"]}"')
        held = {name.removeprefix("here."): tensor for name, tensor in tensors.items()}
        return cls(next(iter(families.values())).rebuild(facts["here"], held), facts["first"], facts["n_heads"])

    def local(self, heads: Sequence[int] | None) -> list[int]:
        """The numbers that heads have among those here.

        Raises:
            CaptureError: one of them is elsewhere.
        """
        wanted = range(self.n_heads) if heads is None else heads
        numbers = [head % self.n_heads - self.first for head in wanted]
        if any(not 0 <= number < self.here.n_heads for number in numbers):
            raise self._elsewhere()
        return numbers

    def _elsewhere(self) -> CaptureError:
        last = self.first + self.here.n_heads - 1
        return CaptureError(f"{ELSEWHERE} {self.first} to {last} of {self.n_heads}", hint=GATHER)

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of heads that are here."""
        return self.here.tile(queries, keys, self.local(heads))

    def statistics(self, names: Sequence[str], **options: Any) -> dict[str, Tensor]:
        """Those of the heads that are here, NaN for the others."""
        found = self.here.statistics(names, **options)
        return {name: in_whole(value, self.first, self.n_heads) for name, value in found.items()}

    def magnitude(self, key_weights: Tensor | None = None) -> Pattern:
        """Not of all heads."""
        raise self._elsewhere()

    def value_norms(self) -> Tensor:
        """Not of all heads."""
        raise self._elsewhere()

    @property
    def lse(self) -> Tensor:
        """[batch, head, query] log of the softmax denominator, NaN where it is elsewhere."""
        return in_whole(self.here.lse, self.first, self.n_heads)

    @property
    def seen(self) -> MaskSummary:
        """What the mask lets through; where heads differ, those that are here."""
        return self.here.seen

    def check(self) -> None:
        """As of the heads that are here."""
        self.here.check()
