"""Reads neighborhood attention of the package natten, in one to three dimensions; positions as in the input."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.hooks.readers.registered import Mixing, ModuleRun, join_heads, reader
from workbench.hooks.readers.state_space import has
from workbench.kernels.neighborhood import neighborhood_attention


@reader(
    "natten.modules.NeighborhoodAttentionGeneric", kind="self",
    when=has("qkv", "proj", "proj_drop", "num_heads", "kernel_size", "stride", "dilation", "is_causal", "scale"),
)  # fmt: skip
def neighborhoods(run: ModuleRun) -> Mixing:
    """Every window is that of our own kernel, whatever tiles and orders the package's back end works in."""
    module: Any = run.module
    x: Tensor = run.inputs["x"]
    shape = tuple(x.shape[1:-1])
    split = module.qkv.forward(x).flatten(1, -2).unflatten(-1, (3, module.num_heads, -1))
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
    pattern = neighborhood_attention.pattern_of(  # type: ignore[attr-defined]
        q, k, v, shape=shape, window=module.kernel_size, stride=module.stride, dilation=module.dilation,
        causal=module.is_causal, scale=module.scale,
    )  # fmt: skip

    def finish(z: Tensor) -> Tensor:
        y: Tensor = module.proj_drop.forward(module.proj.forward(join_heads(z).to(x.dtype).unflatten(1, shape)))
        return y

    return Mixing(pattern, v, finish, "neighborhood", queries=q, keys=k)
