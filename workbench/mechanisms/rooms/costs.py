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
    """Forward time and memory of a module by length.

    Attributes:
        lengths: tokens. seconds: of one forward. over_sdpa: that over the time of plain attention on the same machine,
            at the same length. mib: memory that the forward takes.
        exponent: e of the fit seconds = c·lengthᵉ.
    """

    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    over_sdpa: tuple[float, ...]
    mib: tuple[float, ...]
    exponent: float


def cost_of(name: str, path: Path = COSTS) -> Cost | None:
    """The cost of a mechanism or variant of that name; None where it was not measured."""
    found = _costs(path).get(name)
    if found is None:
        return None
    points = sorted(found["points"], key=lambda point: point["length"])
    return Cost(
        lengths=tuple(point["length"] for point in points),
        seconds=tuple(point["seconds"] for point in points),
        over_sdpa=tuple(point["seconds_over_sdpa"] for point in points),
        mib=tuple(point["mib"] for point in points),
        exponent=found["exponent"],
    )


@cache
def _costs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
