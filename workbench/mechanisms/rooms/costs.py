"""What a mechanism costs as a sequence grows, as a benchmark measured it beside scaled_dot_product_attention."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

COSTS = Path(__file__).parents[1] / "weights" / "cost.json"


@dataclass(frozen=True)
class Cost:
    """Forward time and memory of a layer by length, without its projections.

    Attributes:
        lengths: tokens. seconds: of one forward, the median of several rounds.
        over_sdpa: that over the time of plain attention in the same place, at the same length. mib: peak memory.
        exponent: e of the fit seconds = c·lengthᵉ. ends: the least and the largest of all rounds. None where too few
            lengths were measured.
        machine: where.
    """

    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    over_sdpa: tuple[float, ...]
    mib: tuple[float, ...]
    exponent: float | None
    ends: tuple[float, float] | None
    machine: str

    @property
    def growth(self) -> str:
        """The exponent in words."""
        if self.exponent is None:
            return "how its time grows was not measured"
        ends = "" if self.ends is None else f" ({self.ends[0]:.2f} to {self.ends[1]:.2f})"
        return f"its time grows as the length to the power of {self.exponent:.2f}{ends}"


def cost_of(name: str, path: Path = COSTS) -> Cost | None:
    """The cost of a mechanism or variant of that name; None where it was not measured."""
    held = _costs(path)
    found = held.get("rooms", {}).get(name)
    if found is None or not found["points"]:
        return None
    points = sorted(found["points"], key=lambda point: point["length"])
    low, high = found.get("exponent_low"), found.get("exponent_high")
    return Cost(
        lengths=tuple(point["length"] for point in points),
        seconds=tuple(point["seconds"] for point in points),
        over_sdpa=tuple(point["seconds_over_sdpa"] for point in points),
        mib=tuple(point["mib"] for point in points),
        exponent=found["exponent"],
        ends=None if low is None or high is None else (low, high),
        machine=held.get("facts", {}).get("machine", ""),
    )


@cache
def _costs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
