"""S2-Attention as a function, and the pattern of its calls."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.blocked import attend
from workbench.kernels.checks import check_attention
from workbench.kernels.flex import flex_attend
from workbench.kernels.functions import attention_function
from workbench.kernels.masks import Mask
from workbench.kernels.s2.flex import flex_plan
from workbench.kernels.s2.layout import S2Layout, Shards
from workbench.kernels.s2.lists import check_union
from workbench.kernels.s2.tiles import plan
from workbench.kernels.softmax import SoftmaxPattern

_PASSED_BY = ("workbench.kernels", "workbench.hooks", "torch.")


class S2Pattern(SoftmaxPattern):
    """The exact softmax weights of an S2 layout, zero where it hides.

    Args:
        q: [batch, head, query, d]; k: [batch, kv head, key, d].
        layout: which key blocks each kv head sees.
        scale, lse, values: as in `SoftmaxPattern`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        layout: S2Layout,
        *,
        scale: float | None = None,
        lse: Tensor | None = None,
        values: Tensor | None = None,
    ) -> None:
        check_attention(q, k)
        sizes = (layout.n_queries, layout.n_keys, layout.n_heads, layout.n_kv_heads)
        if sizes != (q.shape[2], k.shape[2], q.shape[1], k.shape[1]):
            raise CaptureError(
                f"the layout is for {sizes[0]} queries, {sizes[1]} keys and {sizes[2]} heads on {sizes[3]} kv heads",
                shape=q.shape,
            )
        mask = Mask(
            q.shape[2], k.shape[2], causal=layout.causal, offset=layout.offset, layout=layout, n_heads=q.shape[1]
        )
        super().__init__(q, k, mask, scale=scale, lse=lse, values=values)
        self.layout = layout

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The facts of the layout and the scale; q, k and what is known of lse and values."""
        _, tensors = super().state()
        return {"scale": self.scale, "layout": self.layout.facts()}, tensors

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> S2Pattern:
        """The pattern from its `state`."""
        held = {name: tensors.get(name) for name in ("lse", "values")}
        return cls(tensors["q"], tensors["k"], S2Layout(**facts["layout"]), scale=facts["scale"], **held)


def pattern(
    q: Tensor,
    k: Tensor,
    *,
    block: int = 64,
    local_blocks: int | tuple[int, int] = 4,
    vert_stride: int = 8,
    head_step: int | None = None,
    head_offset: int = 0,
    n_dense_heads: int = 0,
    homogeneous: bool = False,
    causal: bool = True,
    shards: Shards | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> S2Pattern:
    """The pattern of `s2_attention` with the same options; `lse` is what the kernel gave, if it is at hand."""
    check_attention(q, k)
    layout = _layout(
        q, k, block, local_blocks, vert_stride, head_step, head_offset, n_dense_heads, homogeneous, causal, shards
    )
    return S2Pattern(q, k, layout, scale=scale, lse=lse)


@attention_function(pattern)
def s2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 64,
    local_blocks: int | tuple[int, int] = 4,
    vert_stride: int = 8,
    head_step: int | None = None,
    head_offset: int = 0,
    n_dense_heads: int = 0,
    homogeneous: bool = False,
    causal: bool = True,
    shards: Shards | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over local blocks and the verticals of each head (S2-Attention, arXiv 2407.17678).

    Args:
        q: [batch, head, query, d]; in the causal form the queries are the last of the keys.
        k: [batch, kv head, key, d]; v: [batch, kv head, key, width].
        block, local_blocks, vert_stride, head_step, head_offset, n_dense_heads, homogeneous, causal, shards: see
            `S2Layout`.
        scale: factor on q kᵀ; 1/√d if None.
        return_lse: also give the natural log of the softmax denominator, [batch, head, query].

    Returns:
        [batch, head, query, width], differentiable once in q, k and v.

    Raises:
        CaptureError: wrong tensors, an option out of range, or fewer keys than one block.

    Warns:
        UserWarning: some keys are seen by no head (`check_union`), at these sizes.

    >>> import torch
    >>> q = k = v = torch.ones(1, 2, 64, 8)
    >>> s2_attention(q, k, v, block=16, local_blocks=1, vert_stride=2).shape
    torch.Size([1, 2, 64, 8])
    """
    check_attention(q, k, v)
    layout = _layout(
        q, k, block, local_blocks, vert_stride, head_step, head_offset, n_dense_heads, homogeneous, causal, shards
    )
    _warn_of_holes(layout)
    if q.is_cuda:
        out, lse = flex_attend(q, k, v, flex_plan(layout, q.device), scale)
    else:
        out, lse = attend(q, k, v, plan(layout), scale)
    return (out, lse) if return_lse else out


def _layout(q: Tensor, k: Tensor, block: int, *options: Any) -> S2Layout:
    layout = S2Layout(q.shape[2], k.shape[2], q.shape[1], k.shape[1], block, *options)
    if q.shape[2] == 0:
        raise CaptureError("there are no queries", shape=q.shape)
    if k.shape[2] < block:
        raise CaptureError(
            f"{k.shape[2]} keys are shorter than one block of {block}",
            shape=k.shape,
            hint="take a smaller block, or dense attention for so few keys",
        )
    return layout


def _warn_of_holes(layout: S2Layout) -> None:
    if not layout.causal:  # there all heads are the same by definition: other options change nothing
        return
    beyond = -(-layout.n_keys // layout.block) - layout.local_sides[0]  # blocks that are not local to the last one
    holes = [r for r in check_union(layout) if r < beyond]
    if not holes:
        return
    if layout.shards is not None:
        which, way = f"{holes}", "Put them into a shard, or take None for the shard of one head"
    else:
        which = f"{holes} (mod vert_stride={layout.vert_stride})"
        way = (
            f"{layout.n_kv_heads} kv heads have head_step={layout.step}: take vert_stride <= {layout.n_kv_heads} with "
            "head_step=1, or n_dense_heads=1"
        )
    warnings.warn(
        f"no head sees the key blocks {which} once they are not local. {way}",
        UserWarning,
        stacklevel=_frames_to_the_caller(),
    )


def _frames_to_the_caller() -> int:
    """The stacklevel, for a function that calls this one, of the first frame outside the kernels, hooks and PyTorch."""
    frame = inspect.currentframe()
    level = 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_PASSED_BY):
        frame, level = frame.f_back, level + 1
    return max(level, 1)
