"""Suggested names of patterns, by measured evidence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.analysis.atlas.pooling import SCORES

NAMES = (*SCORES, "content")
"""Names, along the last axis of the evidence: `look` defines all but content."""
UNNAMED = "not named"
"""In the place of a name where nothing speaks for any: of a single token, a query that sees one key has no choice."""
_ENOUGH, _EVEN = 0.5, 0.9
# From the narrow to the wide: a pattern on itself is also in its row and in its block.
_ORDER = (("self", "previous", "next"), ("vertical stripe",), ("row", "column"), ("block",))


def content(dependence: Tensor) -> Tensor:
    """Evidence [...] that a pattern comes from content: c / (1 + c), with c how much it varies over inputs."""
    return dependence / (1 + dependence)


def dependence(maps: Tensor) -> Tensor:
    """[head] mean over inputs of ‖A(x) − Ā‖ / ‖Ā‖, Frobenius, with Ā the mean of maps [example, head, size, size].

    0 for a head whose pattern does not depend on the input; NaN with one input.
    """
    mean = maps.double().mean(0)
    away = (maps.double() - mean).flatten(2).norm(dim=-1).mean(0)
    length = mean.flatten(1).norm(dim=-1)
    found = torch.where(length > 0, away / length.clamp(min=1e-300), 0.0)
    return found if len(maps) > 1 else torch.full_like(found, torch.nan)


def suggest(evidence: Sequence[float]) -> str:
    """The name that evidence [name], in the order of `NAMES`, speaks for.

    The first of these groups whose strongest entry reaches 0.5: self, previous, next; vertical stripe; row, column;
    block. Else uniform if that reaches 0.9. Else the strongest of all but uniform. NaN is no evidence; where there is
    none at all, `UNNAMED`.

    >>> suggest([0.1, 0.8, 0.0, 0.9, 0.0, 0.9, 0.2, 0.3, 0.1])
    'previous'
    >>> suggest([float("nan")] * len(NAMES))
    'not named'
    """
    found = {name: 0.0 if value != value else value for name, value in zip(NAMES, evidence, strict=True)}
    for group in _ORDER:
        strongest = max(group, key=lambda name: found[name])
        if found[strongest] >= _ENOUGH:
            return strongest
    if found["uniform"] >= _EVEN:
        return "uniform"
    strongest = max((name for name in reversed(NAMES) if name != "uniform"), key=lambda name: found[name])
    return strongest if found[strongest] > 0 else UNNAMED
