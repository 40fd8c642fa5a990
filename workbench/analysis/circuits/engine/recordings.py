"""Batches as they were recorded, for methods that come back to each of them many times."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workbench.analysis.circuits.engine.prompts import Pair
from workbench.analysis.circuits.engine.replacements import Replacements
from workbench.analysis.circuits.engine.setup import Setup
from workbench.analysis.circuits.engine.stream import Kept, Recorded


@dataclass(frozen=True)
class Recording:
    """A batch as the model ran it.

    Attributes:
        logits: of the prompts. clean: what is in their streams. values: what replaces senders, for each draw.
    """

    logits: Tensor
    clean: Kept
    values: list[Kept]


class Recordings:
    """Records each batch once, as far as the memory of the setup goes; what does not fit is recorded again each time.

    Args:
        replacements: of the senders that are left out.
    """

    def __init__(self, setup: Setup, replacements: Replacements) -> None:
        self.setup, self.replacements = setup, replacements
        self.room = setup.memory
        self._held: dict[int, tuple[Recording, Recorded]] = {}

    def of(self, pair: Pair) -> Recording:
        """The batch; forwards of it then resume from there, and run only where something has changed."""
        known = self._held.get(pair.start)
        if known is not None:
            self.setup.stream.go_back(known[1])
            return known[0]
        logits, clean, twin = self.setup.record(pair)
        state = self.setup.stream.recorded
        made = Recording(logits, clean, self.replacements.several(pair, clean, twin))
        size = state.nbytes + sum(values.nbytes for values in made.values)
        if size <= self.room or not self._held:  # one batch is at hand in any case
            self.room -= size
            self._held[pair.start] = made, state
        return made
