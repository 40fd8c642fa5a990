"""The definitions, on a whole pattern in float64: the truth that streaming is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.kernels.masks import Mask
from workbench.kernels.statistics.existing import Rows
from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.record import known
from workbench.kernels.statistics.whole_rows import WholeRows


def dense(
    pattern: Tensor,
    names: Sequence[str],
    mask: Mask,
    *,
    lse: Tensor | None = None,
    options: Options | None = None,
    by_magnitude: bool = False,
) -> dict[str, Tensor]:
    """The definitions, on a whole pattern in float64. This is the truth that streaming is compared with.

    Args:
        pattern: [batch, head, query, key]; zero where a key is hidden.
        names: statistics; `value_weighted_` names are the caller's business (pass the weighted pattern).
        mask: which keys each query sees.
        lse: [batch, head, query], passed through for `lse`.
        by_magnitude: speak of |A| normalised per row; a row without weight counts as one that sees no key.

    >>> A = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    >>> dense(A, ["entropy", "received"], Mask(2, 2, causal=True))["received"].tolist()
    [[[1.5, 0.5]]]
    """
    p = pattern.double()
    n_batch, n_heads, n_queries, n_keys = p.shape
    seen = mask.visible(slice(0, n_queries), slice(0, n_keys), slice(0, n_batch), slice(0, n_heads))
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool) if seen is None else seen
    signed, size = p.sum(-1), p.abs().sum(-1)
    if by_magnitude:
        p = torch.where(size[..., None] > 0, p.abs() / size[..., None], 0.0)
    rows = WholeRows(
        p=p,
        seen=seen.to(p.device).expand_as(p),
        offset=mask.offset,
        n_queries=n_queries,
        options=options or Options(),
        lse=None if lse is None else lse.double(),
        signed=signed,
        size=size,
        by_magnitude=by_magnitude,
    )
    found: dict[str, Tensor] = {}
    for name in names:
        statistic = known(name)
        found |= statistic.existing(
            statistic.defined(rows), Rows(mask, (n_batch, n_heads, n_queries, n_keys), p.device), rows.options
        )
    return found
