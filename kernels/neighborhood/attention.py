"""Neighborhood attention as a function, and the pattern of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.blocked import attend
from workbench.kernels.checks import check_attention
from workbench.kernels.flex import flex_attend
from workbench.kernels.functions import attention_function
from workbench.kernels.grouped.pattern import GroupedPattern
from workbench.kernels.masks import Mask
from workbench.kernels.neighborhood.flex import flex_plan
from workbench.kernels.neighborhood.layout import NeighborhoodLayout
from workbench.kernels.neighborhood.neighbors import biased_attention, biased_pattern
from workbench.kernels.neighborhood.tiles import plan
from workbench.kernels.softmax import SoftmaxPattern

_LEAST_BLOCK = 16  # smaller ones would be more numbers than the layout saves


class NeighborhoodPattern(SoftmaxPattern):
    """The exact softmax weights over neighborhoods, [batch, head, token, token or extra key], tokens row-major.

    Args:
        q: [batch, head, token, d]; k: [batch, kv head, token or extra key, d].
        layout: which tokens each sees, row-major.
        scale, lse, values: as in `SoftmaxPattern`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        layout: NeighborhoodLayout,
        *,
        scale: float | None = None,
        lse: Tensor | None = None,
        values: Tensor | None = None,
    ) -> None:
        check_attention(q, k)
        _check_sizes(layout, q, k)
        if layout.tile is not None or layout.block < _LEAST_BLOCK:
            raise CaptureError(
                f"the layout of a pattern is row-major, in blocks of {_LEAST_BLOCK} or more, "
                f"not tile={layout.tile} and block={layout.block}"
            )
        mask = Mask(q.shape[2], k.shape[2], layout=layout, n_heads=q.shape[1])
        super().__init__(q, k, mask, scale=scale, lse=lse, values=values)
        self.layout = layout

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The facts of the layout and the scale; q, k and what is known of lse and values."""
        _, tensors = super().state()
        return {"scale": self.scale, "layout": self.layout.facts()}, tensors

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> NeighborhoodPattern:
        """The pattern from its `state`."""
        held = {name: tensors.get(name) for name in ("lse", "values")}
        layout = NeighborhoodLayout(**facts["layout"])
        return cls(tensors["q"], tensors["k"], layout, scale=facts["scale"], **held)


def pattern(
    q: Tensor,
    k: Tensor,
    *,
    shape: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    extra_keys: int = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> NeighborhoodPattern | GroupedPattern:
    """The pattern of `neighborhood_attention` with the same options; `lse` is what the kernel gave, if at hand."""
    check_attention(q, k)
    layout = _layout(q, k, shape, window, stride, dilation, causal, extra_keys)
    if bias is not None:
        return biased_pattern(q, k, layout, bias, scale)
    return NeighborhoodPattern(q, k, layout, scale=scale, lse=lse)


@attention_function(pattern)
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shape: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    extra_keys: int = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    tile: Sequence[int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each token over the window around it (arXiv 2504.16922), in one, two or three dimensions.

    Args:
        q: [batch, head, prod(shape), d], tokens row-major.
        k: [batch, kv head, prod(shape) + extra_keys, d]; v: the same with its own width.
        shape: lengths of the dimensions.
        window: keys seen in each dimension. stride: so many neighbours share one window. dilation: step between the
            keys of a window. causal: no key after the query, in that dimension. One value stands for all dimensions.
        extra_keys: keys after those of the tokens, such as text, that every query sees.
        bias: [head, 2 · window − 1, …], learned scores by the offset of a key from its query in each dimension, in
            steps of the dilation; for windows that slide by one, and not with `return_lse`. Holds a weight for each
            query and key of its window.
        scale: factor on q kᵀ; 1/√d if None.
        tile: queries of a tile in each dimension, on the CPU; chosen if None.
        return_lse: also give the natural log of the softmax denominator, [batch, head, query].

    Returns:
        [batch, head, query, width], differentiable once in q, k and v.

    Raises:
        CaptureError: wrong tensors, a shape that is not theirs, or an option out of range.

    >>> import torch
    >>> q = k = v = torch.ones(1, 2, 24, 8)
    >>> neighborhood_attention(q, k, v, shape=(4, 6), window=3).shape
    torch.Size([1, 2, 24, 8])
    """
    check_attention(q, k, v)
    layout = _layout(q, k, shape, window, stride, dilation, causal, extra_keys)
    if bias is not None:
        if return_lse:
            raise CaptureError("with a bias there is no log-sum-exp", hint="leave out return_lse")
        return biased_attention(q, k, v, layout, bias, scale)
    if q.is_cuda:
        out, lse = permuted_flex(q, k, v, layout, scale)
    else:
        out, lse = attend(q, k, v, plan(layout, None if tile is None else _checked_tile(tile, layout)), scale)
    return (out, lse) if return_lse else out


def permuted_flex(
    q: Tensor, k: Tensor, v: Tensor, layout: NeighborhoodLayout, scale: float | None = None, compiled: bool = True
) -> tuple[Tensor, Tensor]:
    """On FlexAttention, with tokens in an order in which boxes are its blocks; outputs in row-major order.

    `flex_plan` says how many pairs of blocks are visited, and how few any order could (`fewest_blocks`). A key lies in
    one block only: where windows reach less far than a box is wide, more is visited than the keys seen would fill.
    """
    return flex_attend(q, k, v, flex_plan(layout, q.shape[1], q.device), scale, compiled)


def _layout(
    q: Tensor,
    k: Tensor,
    shape: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    causal: bool | Sequence[bool],
    extra_keys: int,
) -> NeighborhoodLayout:
    given: dict[str, Any] = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    given = {name: tuple(value) if isinstance(value, Sequence) else value for name, value in given.items()}
    layout = NeighborhoodLayout(tuple(shape), extra_keys=extra_keys, **given)
    _check_sizes(layout, q, k)
    return layout


def _check_sizes(layout: NeighborhoodLayout, q: Tensor, k: Tensor) -> None:
    for name, tensor, wanted in (("queries", q, layout.n_tokens), ("keys", k, layout.n_keys)):
        if tensor.shape[2] != wanted:
            raise CaptureError(
                f"there are {tensor.shape[2]} {name}, and shape={list(layout.shape)} with "
                f"extra_keys={layout.extra_keys} makes {wanted}",
                shape=tensor.shape,
            )


def _checked_tile(tile: Sequence[int], layout: NeighborhoodLayout) -> tuple[int, ...]:
    if len(tile) != len(layout.shape) or min(tile) < 1:
        raise CaptureError(f"tile={list(tile)} does not fit shape={list(layout.shape)}", hint="leave it out")
    return tuple(tile)
