"""From the raw sums that engines collected to statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.record import known
from workbench.kernels.tile import Space


def finish(raw: Mapping[str, Tensor], names: Sequence[str], space: Space, options: Options) -> dict[str, Tensor]:
    """The named statistics, in the pattern's dtype. A query that sees no key has what its record calls `empty`."""
    found: dict[str, Tensor] = {}
    for name in names:
        found |= known(name).finished(raw, space, options)
    return found
