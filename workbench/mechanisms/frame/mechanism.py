"""A mechanism as the gallery, the harness and the training script know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError, nearest
from workbench.mechanisms.frame.card import Card, table_of
from workbench.mechanisms.frame.options import check_options
from workbench.mechanisms.frame.place import Place
from workbench.mechanisms.frame.signature import Signature

SEQUENCES = (Place(24, 4, 17), Place(16, 2, 33), Place(12, 4, 1))
BOTH = (*SEQUENCES, Place(24, 4, 15, causal=False), Place(16, 2, 35, causal=False, grid=(5, 7)))
GRIDS = (Place(24, 4, 36, causal=False, grid=(6, 6)), Place(16, 2, 45, causal=False, grid=(5, 9)))


@dataclass(frozen=True)
class Mechanism:
    """A room: a module to be put in the place of self-attention, and what is known of it.

    Attributes:
        name: by which `mechanisms.get` finds it.
        card: what it is.
        make: makes the module for a place, with options of its own: [batch, token, d_model] in and out.
        places: small ones, of odd sizes, on which the harness examines it; by default such as the card allows.
        variants: options by name, such as the forms that a paper compares.
        inputs: the module's inputs by name, for one that is given more than x; None for x alone.
        signature: what one looks at first in its heads, beside their map; None for the map alone. also: what comes
            next, where that has another shape.

    >>> from workbench import mechanisms
    >>> layer = mechanisms.get("sqa").build(mechanisms.Place(32, 4, 128), "xsqa")
    >>> layer(torch.zeros(1, 100, 32)).shape
    torch.Size([1, 100, 32])
    """

    name: str
    card: Card
    make: Callable[..., nn.Module]
    places: tuple[Place, ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs: Callable[[Place], dict[str, Tensor]] | None = None
    signature: Signature | None = None
    also: Signature | None = None

    def __post_init__(self) -> None:
        if not self.places:
            usual = {"always": SEQUENCES, "never": BOTH[len(SEQUENCES) :], "either": BOTH}[self.card.causal]
            usual = GRIDS if self.card.grid else usual
            object.__setattr__(self, "places", usual)

    def build(self, place: Place, variant: str | None = None, **options: Any) -> nn.Module:
        """The module for a place.

        Args:
            variant: one of `variants`. options: of the mechanism, on top of the variant's.

        Raises:
            WorkbenchError: it cannot stand in this place, there is no such variant or option, or a value that it cannot
                take.
        """
        card = self.card
        if not isinstance(place, Place):
            raise WorkbenchError(
                f'"{self.name}" stands in a Place, not in {place!r}', hint="Place(d_model, heads, length)"
            )
        if card.grid and place.grid is None:
            raise WorkbenchError(f'"{self.name}" mixes the patches of an image', hint="Place(…, grid=(rows, columns))")
        if place.causal and card.causal == "never":
            raise WorkbenchError(
                f'"{self.name}" sees the whole sequence before it mixes any of it, and cannot be causal',
                hint="Place(…, causal=False)",
            )
        if not place.causal and card.causal == "always":
            raise WorkbenchError(f'"{self.name}" is causal, and has no other form', hint="Place(…, causal=True)")
        if variant is not None and variant not in list(self.variants):
            raise WorkbenchError(
                f'"{self.name}" has no variant "{variant}"', hint=nearest(variant, list(self.variants), "variant")
            )
        check_options(self.name, self.make, options)
        return self.make(place, **{**({} if variant is None else self.variants[variant]), **options})

    def example(self, place: Place, seed: int = 0) -> dict[str, Tensor]:
        """Inputs of the module by name, drawn at random for two examples."""
        if self.inputs is not None:
            return self.inputs(place)
        random = torch.Generator().manual_seed(seed)
        return {"x": torch.randn(2, place.length, place.d_model, generator=random)}

    def __repr__(self) -> str:
        forms = f"\n  {'Variants'.ljust(8)}  {', '.join(self.variants)}" if self.variants else ""
        return f"{self.name}: {self.card}{forms}"

    def _repr_html_(self) -> str:
        forms = [("Variants", ", ".join(self.variants))] if self.variants else []
        return table_of(f"{self.name}: {self.card.title}", [*self.card.lines(), *forms])
