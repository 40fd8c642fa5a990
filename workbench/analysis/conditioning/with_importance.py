"""How what was measured of heads goes with their importance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.importance.result import HeadImportance
from workbench.analysis.statistics.correlation import spearman
from workbench.analysis.statistics.intervals import rank_correlation
from workbench.errors import WorkbenchError
from workbench.hooks.sites import Site


def correlations(quantities: Mapping[str, Tensor], scores: Tensor) -> dict[str, tuple[float, float, float]]:
    """Spearman's ρ of each quantity [row] with the scores [row], and its 95 % interval, by Fisher's z.

    Rows without a score (NaN) are left out. With fewer than four rows there is no relation to speak of: (0, −1, 1); nor
    where one of the two does not vary.
    """
    known = scores.isfinite()
    y = scores[known]
    found = {}
    for name, values in quantities.items():
        rho = float(spearman(values.double()[known], y)) if len(y) > 3 else math.nan
        found[name] = (0.0, -1.0, 1.0) if math.isnan(rho) else (rho, *rank_correlation(rho, len(y)))
    return found


def scores_of(
    rows: Sequence[tuple[Site, int]], importance: HeadImportance | Mapping[Any, float] | None
) -> Tensor | None:
    """[row] the score of each head (its site and number), NaN without one; None if no scores were given.

    Raises:
        WorkbenchError: none of the scores is that of such a head, or one goes by a layer that several sites have.
    """
    if importance is None:
        return None
    if isinstance(importance, HeadImportance):
        found = zip(importance.sites, importance.numbers, importance.score().tolist(), strict=True)
        importance = {(site, number): score for site, number, score in found}
    scores = [torch.nan] * len(rows)
    for key, score in importance.items():
        at = [i for i, (site, head) in enumerate(rows) if any(key == (name, head) for name in _names(site))]
        if len(at) > 1:
            raise WorkbenchError(
                f"the importance of {key!r} could be that of {len(at)} heads",
                hint=f"say which site: ({rows[at[0]][0].alias!r}, {rows[at[0]][1]})",
            )
        for i in at:
            scores[i] = float(score)
    if all(math.isnan(score) for score in scores):
        raise WorkbenchError(
            "none of the importance scores is that of a probed head", hint="keys are (layer, head) or (site name, head)"
        )
    return torch.tensor(scores, dtype=torch.float64)


def _names(site: Site) -> tuple[int | str, ...]:
    return (site.layer, site.name, *site.aliases)
