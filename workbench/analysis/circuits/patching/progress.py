"""How far a patching has come: what it keeps in a file, so that it can be gone on from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.analysis.circuits.engine.setup import Setup
from workbench.errors import FormatError
from workbench.hooks.together import done_by_all
from workbench.storage.result import Result
from workbench.sweep.inputs import check_resumed

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Patching(Result):
    """Patches that were tried, whole or interrupted. `patch_heads` and `patch_layers` go on from it (`resume=path`).

    Attributes:
        units: what is patched, one at a time, such as "L3 resid_pre". places: where.
        effects: [unit, place, example] of the metric with the patch, minus without; NaN where it has not been tried, or
            where a unit has no such place.
        done: [unit, place, batch], True where it has been.
        identity: what a file must share to be gone on from.
    """

    form = "workbench.patching"

    units: Annotated[tuple[str, ...], "unit"]
    places: Annotated[tuple[str, ...], "place"]
    effects: Float[Tensor, "unit place example"]
    done: Bool[Tensor, "unit place batch"]
    identity: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether every patch has been tried on every batch."""
        return bool(self.done.all())

    @property
    def table(self) -> pd.DataFrame:
        """One row per unit and place: the mean effect over the examples that are done, and the share of batches."""
        import pandas as pd

        rows = [
            (unit, place, float(self.effects[i, j].nanmean()), float(self.done[i, j].double().mean()))
            for i, unit in enumerate(self.units)
            for j, place in enumerate(self.places)
        ]
        return pd.DataFrame(rows, columns=["unit", "position", "effect", "done"])

    def __repr__(self) -> str:
        done = "" if self.complete else f", {int(self.done.sum())} of {self.done.numel()} done"
        return f"Patching({len(self.units)} units at {len(self.places)} places{done})"


class PatchingInterrupted(KeyboardInterrupt):
    """Ctrl-C during a patching. `partial` holds what is done; save it, and pass its path as `resume` to go on."""

    def __init__(self, partial: Patching, path: Path | None) -> None:
        self.partial = partial
        where = f"it is in {path}" if path else "keep it with error.partial.save(path)"
        done = f"{int(partial.done.sum())} of {partial.done.numel()} patches are done"
        super().__init__(f"{done}; {where}, and go on with resume=path")


def start(
    setup: Setup, path: Path | None, units: tuple[str, ...], places: tuple[str, ...], **settings: Any
) -> Patching:
    """Where to begin: what a file holds if it is there, else nothing done.

    Args:
        settings: of the patching, for the identity.

    Raises:
        FormatError: the file is no patching, truncated, changed, or of another model, task or settings.
    """
    identity = setup.identity(units=list(units), places=list(places), **settings)
    shape = (len(units), len(places), len(setup.pairs))
    if path is not None and path.exists():
        held = Patching.load(path)
        check_resumed(held.identity, identity, path.name, "patching")
        if held.done.shape != shape or held.effects.shape[-1] != len(setup.task):
            raise FormatError(f"{path.name} has other patches than it says", hint="give a new file")
    else:
        held = Patching(
            units=units, places=places,
            effects=torch.full((*shape[:2], len(setup.task)), torch.nan, dtype=torch.float64),
            done=torch.zeros(shape, dtype=torch.bool), identity=identity, provenance=setup.provenance(),
        )  # fmt: skip
    return replace(held, done=done_by_all(setup.wb.model, held.done))
