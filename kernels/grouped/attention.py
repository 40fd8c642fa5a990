"""Softmax attention inside groups of positions, from gathered queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention
from workbench.kernels.grouped.pattern import gathered


def group_weights(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    causal: bool = False,
    pads: bool = False,
) -> Tensor:
    """[batch, head, group, row, column]: the softmax of each row over the columns of its group.

    Args:
        q: [batch, head, query, d]; k: [batch, head, key, d].
        rows, columns: positions, [1 or batch, 1 or head, group, place]; −1 for none.
        scale: factor on q kᵀ; 1/√d if None.
        bias: added to the scaled scores. hidden: what no row sees besides. Both broadcast to the weights.
        causal: no column after the row is seen.
        pads: columns that are none take part in the softmax with a score of their bias alone, as zeros around an image
            do; their weights are zero all the same, so that rows sum to less than one.

    A row that sees nothing has zeros.

    Raises:
        CaptureError: queries and keys of different heads.
    """
    if q.shape[1] != k.shape[1]:
        raise CaptureError(
            f"groups of {q.shape[1]} heads take as many of keys, not {k.shape[1]}",
            shape=k.shape,
            hint="repeat keys and values for the heads that share them",
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = gathered(q.to(dtype), rows) @ gathered(k.to(dtype), columns).mT * scale
    if bias is not None:
        scores = scores + bias
    none = (columns < 0)[..., None, :]
    blind = torch.zeros_like(none) if pads else none
    if causal:
        blind = blind | (columns[..., None, :] > rows[..., :, None])
    if hidden is not None:
        blind = blind | hidden
    low = torch.finfo(dtype).min
    weights = scores.masked_fill(blind, low).softmax(-1)
    return weights.masked_fill(blind | none | (rows < 0)[..., None], 0)


def check_sequence(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Raise a CaptureError unless queries, keys and values can meet in attention and are of the same positions."""
    check_attention(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise CaptureError(f"groups are of one sequence, not of {q.shape[2]} queries and {k.shape[2]} keys")
