"""The nouns of an investigation: what an analysis found, a plan and who made it, a sentence and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workbench.analysis.circuits.circuit import Circuit
from workbench.investigator.plan import Plan
from workbench.storage.json_text import finite
from workbench.storage.result import Result

_MAIN = ("circuit", "importance", "overlap", "repair", "roles", "faithfulness")


@dataclass(frozen=True)
class Finding:
    """What one analysis found, or why it did not.

    Attributes:
        number: its place, from 0. analysis, arguments: what was run; "baseline" comes first, unplanned.
        status: "done"; "failed", with an error; "refused", before it ran; "stopped", by the budget.
        numbers: JSON values. says: sentences, each of which rests on `results`, by name.
        forwards, seconds: what it cost.
    """

    number: int
    analysis: str
    arguments: Mapping[str, Any]
    status: str
    numbers: Mapping[str, Any]
    says: tuple[str, ...]
    forwards: int
    seconds: float
    results: Mapping[str, Result] = field(default_factory=dict, compare=False)

    @property
    def main(self) -> Result | None:
        """The result that a report shows; None where there is none, or nothing in it that a sentence does not say."""
        if self.analysis == "all_heads":
            return None
        found = next((self.results[name] for name in _MAIN if name in self.results), None)
        return None if isinstance(found, Circuit) and not found.nodes else found

    def told(self) -> dict[str, Any]:
        """What a planner is told; not how long it took, which differs from run to run."""
        return {
            "number": self.number, "analysis": self.analysis, "arguments": dict(self.arguments), "status": self.status,
            "numbers": finite(self.numbers), "says": list(self.says), "forwards": self.forwards,
        }  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A plan, when it was made and by whom.

    Attributes:
        at: how many findings there were. by: "rules" or "planner". refused: why answers of the planner were not used.
    """

    at: int
    plan: Plan
    by: str
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sentence:
    """A sentence, and the numbers of the findings that it rests on."""

    text: str
    rests_on: tuple[int, ...]
