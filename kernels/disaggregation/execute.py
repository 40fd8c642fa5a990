"""The attention of items: in whatever order and on whatever device they run, their rows are those of the whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.disaggregation.items import Item
from workbench.kernels.masks import Mask
from workbench.kernels.softmax import SoftmaxPattern


def attend(
    item: Item, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, names: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """Causal attention of an item's rows.

    Args:
        q: [1, head, row of the item, d], in the order of `item.rows`. k, v: [1, kv head, key, d or width] of the first
            `item.n_keys` tokens of the document.
        scale: factor on q kᵀ; 1/√d if None. names: of statistics of rows that go with them.

    Returns:
        The output [1, head, row, width], the log-sum-exp [1, head, row], and the statistics by name.

    Raises:
        CaptureError: sizes that are not the item's.

    >>> one = torch.ones(1, 1, 5, 2)
    >>> item = Item(0, 5, 1, 2)
    >>> attend(item, one[:, :, :2], one[:, :, :4], one[:, :, :4])[1].exp().round().flatten().tolist()
    [8.0, 16.0]
    """
    if q.shape[2] != item.n_rows or k.shape[2] != item.n_keys or v.shape[2] != item.n_keys:
        raise CaptureError(
            f"{q.shape[2]} queries and {k.shape[2]} keys for an item of {item.n_rows} rows that reads {item.n_keys}",
            shape=q.shape,
        )
    outs, lses, found = [], [], []
    first = 0
    for rows in item.ranges:
        part, n_keys = q[:, :, first : first + len(rows)], rows.stop
        pattern = SoftmaxPattern(part, k[:, :, :n_keys], Mask(len(rows), n_keys, True, offset=rows.start), scale=scale)
        outs.append(pattern.apply(v[:, :, :n_keys]).to(v.dtype))
        lses.append(pattern.lse)
        found.append(pattern.statistics(list(names)) if names else {})
        first += len(rows)
    named = {name: torch.cat([each[name] for each in found], dim=2) for name in found[0]}
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2), named
