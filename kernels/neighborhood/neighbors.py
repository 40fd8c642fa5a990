"""Neighborhoods with a learned score for each offset: one group of keys for each query, and nothing else is held."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.grouped.attention import check_sequence, group_weights
from workbench.kernels.grouped.pattern import GroupedPattern, apply_groups
from workbench.kernels.neighborhood.layout import NeighborhoodLayout, flat_tiles


@lru_cache(maxsize=16)
def neighbors(layout: NeighborhoodLayout) -> tuple[Tensor, Tensor]:
    """The keys that each token sees, and the offset of each as a number into a flat table, both [token, key].

    The table has 2 · window − 1 offsets in each dimension, in steps of the dilation, that of the token itself in the
    middle.

    >>> keys, offsets = neighbors(NeighborhoodLayout((5,), 3))
    >>> keys[0].tolist(), offsets[0].tolist(), offsets[2].tolist()
    ([0, 1, 2], [2, 3, 4], [1, 2, 3])
    """
    keys, offsets = [], []
    with torch.inference_mode(False):  # they are kept, also for calls whose gradients need them
        for axis in layout.axes:
            x = torch.arange(axis.length)
            at = axis.bounds(x)[0][:, None] + torch.arange(axis.window)
            keys.append(at * axis.dilation + (x % axis.dilation)[:, None])
            offsets.append(at - (x // axis.dilation)[:, None] + axis.window - 1)
        return flat_tiles(keys, layout.shape), flat_tiles(offsets, [2 * axis.window - 1 for axis in layout.axes])


def neighbor_weights(
    q: Tensor, k: Tensor, layout: NeighborhoodLayout, *, bias: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax of each token over its neighborhood, as `GroupedPattern` takes it: a group for each token.

    Args:
        q, k: [batch, head, token, d]. layout: windows that slide by one and are not causal, without further keys.
        bias: [head, 2 · window − 1, …], added to the scaled scores by the offset of a key.
        scale: factor on q kᵀ; 1/√d if None.

    Returns:
        Weights [batch, head, token, 1, key], rows [1, 1, token, 1] and columns [1, 1, token, key].

    Raises:
        CaptureError: another layout, or tensors that do not fit it.
    """
    check_sequence(q, k)
    if layout.extra_keys or layout.tile is not None or any(axis.causal or axis.stride > 1 for axis in layout.axes):
        raise CaptureError("scores by offset are for windows that slide by one, not causal, without further keys")
    if q.shape[2] != layout.n_tokens:
        raise CaptureError(f"{q.shape[2]} tokens are no {' × '.join(map(str, layout.shape))}", shape=q.shape)
    keys, offsets = (t.to(q.device) for t in neighbors(layout))
    rows, columns = torch.arange(len(keys), device=q.device)[None, None, :, None], keys[None, None]
    added = None
    if bias is not None:
        wanted = (q.shape[1], *(2 * axis.window - 1 for axis in layout.axes))
        if tuple(bias.shape) != wanted:
            raise CaptureError(f"bias must be {list(wanted)}, [head, offset …]", shape=bias.shape)
        added = bias.flatten(1)[:, offsets][None, :, :, None]
    return group_weights(q, k, rows, columns, scale=scale, bias=added), rows, columns


def biased_pattern(
    q: Tensor, k: Tensor, layout: NeighborhoodLayout, bias: Tensor, scale: float | None
) -> GroupedPattern:
    """The map of `biased_attention`."""
    weights, rows, columns = neighbor_weights(q, k, layout, bias=bias, scale=scale)
    return GroupedPattern(weights, rows, columns, layout.n_tokens, layout.n_tokens)


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: NeighborhoodLayout, bias: Tensor, scale: float | None
) -> Tensor:
    """[batch, head, token, width] of `neighborhood_attention` with a bias."""
    check_sequence(q, k, v)
    weights, rows, columns = neighbor_weights(q, k, layout, bias=bias, scale=scale)
    return apply_groups(weights, v.to(weights.dtype), rows, columns, layout.n_tokens).to(v.dtype)
