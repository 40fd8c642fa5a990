"""Attention weights times the gradients that reach them: what each sum of A∘∂L/∂A means, and all of them, streamed.

out = A·V, so that ∂L/∂A[i, j] = ∂L/∂z_i · v_j. Summed over keys or queries, A∘∂L/∂A has closed forms, and no map is
needed; the sum of magnitudes has none, so that all are taken from the same tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels import streaming

if TYPE_CHECKING:
    from workbench.kernels.patterns import Pattern


@dataclass(frozen=True)
class GradientSum:
    """One sum of A∘∂L/∂A.

    Attributes:
        axes: what follows [batch, head]: "query", "key", or "" for nothing.
        meaning: its definition; i counts queries, j keys.
    """

    name: str
    axes: Literal["query", "key", ""]
    meaning: str


GRADIENT_SUMS: dict[str, GradientSum] = {
    s.name: s
    for s in (
        GradientSum("query_gradient", "query", "Σ_j A_ij ∂L/∂A_ij = z_i · ∂L/∂z_i"),
        GradientSum("key_gradient", "key", "Σ_i A_ij ∂L/∂A_ij = (Aᵀ ∂L/∂z)_j · v_j"),
        GradientSum("head_gradient", "", "Σ_ij A_ij ∂L/∂A_ij = ∂L/∂g at g = 1, if g multiplied the head's output"),
        GradientSum("key_gradient_magnitude", "key", "Σ_i |A_ij ∂L/∂A_ij|"),
    )
}
"""Every sum by name. L is what `backward` was called on: a loss that sums over the batch keeps its entries apart.

The mean of |head_gradient| over examples is the head importance of Michel et al. 2019 (arXiv 1905.10650).
"""


def attention_times_gradient(pattern: Pattern, z_gradient: Tensor, values: Tensor) -> dict[str, Tensor]:
    """All of `GRADIENT_SUMS`, tile by tile, in memory that grows with the length alone.

    A query that sees no key has no weights: it adds nothing.

    Args:
        pattern: the map A [batch, head, query, key].
        z_gradient: [batch, head, query, width] ∂L/∂z, where z = A·V.
        values: [batch, kv head, key, width].

    Returns:
        name -> tensor in the pattern's dtype, [batch, head] and what its axes say.

    Raises:
        CaptureError: the gradient or the values do not fit the pattern.

    >>> from workbench.kernels.patterns import DensePattern
    >>> pattern = DensePattern(torch.tensor([[0.25, 0.75]])[None, None])
    >>> sums = attention_times_gradient(pattern, torch.ones(1, 1, 1, 1), torch.tensor([[4.0], [-4.0]])[None, None])
    >>> sums["key_gradient"].tolist(), sums["head_gradient"].tolist()
    ([[[1.0, -3.0]]], [[-2.0]])
    """
    b, h, n_q, n_k = pattern.shape
    _check("gradient", z_gradient, (b, h, n_q), values.shape[-1])
    if values.dim() != 4 or values.shape[1] == 0 or h % values.shape[1]:
        raise CaptureError("the values do not fit the heads of the pattern", shape=values.shape)
    _check("values", values, (b, values.shape[1], n_k), values.shape[-1])
    g, v = z_gradient.detach().to(pattern.dtype), values.detach().to(pattern.dtype)
    group = h // v.shape[1]
    query = g.new_zeros(b, h, n_q)
    key, magnitude = g.new_zeros(b, h, n_k), g.new_zeros(b, h, n_k)
    for tile in streaming.tiles(pattern):
        columns = (tile.batch, tile.heads, tile.keys)
        v_t = v[columns] if group == 1 else _of_heads(v[tile.batch, :, tile.keys], tile.heads, group)
        product = (g[tile.rows] @ v_t.transpose(-1, -2)).mul_(tile.p)  # ∂L/∂A, times A
        query[tile.rows] += product.sum(-1)
        key[columns] += product.sum(-2)
        magnitude[columns] += product.abs_().sum(-2)
    return {
        "query_gradient": query,
        "key_gradient": key,
        "head_gradient": query.sum(-1),
        "key_gradient_magnitude": magnitude,
    }


def _of_heads(values: Tensor, heads: slice, group: int) -> Tensor:
    """[b, head, k, width] out of [b, kv head, k, width], for these query heads."""
    index = torch.arange(heads.start, heads.stop, device=values.device) // group
    return values[:, index]


def _check(name: str, tensor: Tensor, leading: Sequence[int], width: int) -> None:
    if tuple(tensor.shape) != (*leading, width):
        raise CaptureError(f"the {name} should be {[*leading, width]}", shape=tensor.shape)
