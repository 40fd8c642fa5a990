"""Reads blocked attention with a halo, over the pixels of the whole image: of halonet-pytorch, and of timm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from workbench.hooks.readers.registered import Mixing, ModuleRun, join_heads, reader
from workbench.hooks.readers.state_space import has
from workbench.kernels.grouped import halo_attention


@reader(
    "halonet_pytorch.halonet_pytorch.HaloAttention", kind="self",
    when=has("rel_pos_emb", "to_q", "to_kv", "to_out", "block_size", "halo_size"),
)  # fmt: skip
def halo_of_halonet(run: ModuleRun) -> Mixing:
    """What the window sees outside of the image is hidden; positions are scaled as the scores are."""
    module: Any = run.module
    x: Tensor = run.inputs["x"]
    grid = (x.shape[2], x.shape[3])
    tokens = x.flatten(2).transpose(1, 2)
    made = (module.to_q.forward(tokens), *module.to_kv.forward(tokens).chunk(2, dim=-1))
    q, k, v = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in made)
    tables = {"rel_height": module.rel_pos_emb.rel_height, "rel_width": module.rel_pos_emb.rel_width}

    def finish(z: Tensor) -> Tensor:
        y: Tensor = module.to_out.forward(join_heads(z).to(x.dtype))
        return y.transpose(1, 2).unflatten(2, grid)

    pattern = halo_attention.pattern_of(  # type: ignore[attr-defined]
        q, k, v, grid=grid, block=module.block_size, halo=module.halo_size, scale=module.scale, scaled_positions=True,
        **tables,
    )  # fmt: skip
    return Mixing(pattern, v, finish, "halo", queries=q, keys=k)


def _is_whole(module: nn.Module) -> bool:
    return has("q", "kv", "pos_embed", "pool", "win_size")(module) and bool(module.block_stride == 1)


@reader("timm.layers.halo_attn.HaloAttn", kind="self", when=_is_whole, follows=("pool",))
def halo_of_timm(run: ModuleRun) -> Mixing:
    """What the window sees outside of the image takes part in the softmax: rows there sum to less than one."""
    module: Any = run.module
    x: Tensor = run.inputs["x"]
    grid = (x.shape[2], x.shape[3])
    q = module.q.forward(x).flatten(2).unflatten(1, (module.num_heads, -1)).transpose(2, 3)
    kv = module.kv.forward(x).flatten(2).unflatten(1, (module.num_heads, -1)).transpose(2, 3)
    k, v = kv.split((module.dim_head_qk, module.dim_head_v), dim=-1)
    tables = {"rel_height": module.pos_embed.height_rel, "rel_width": module.pos_embed.width_rel}

    def finish(z: Tensor) -> Tensor:
        y: Tensor = module.pool.forward(z.to(x.dtype).transpose(2, 3).flatten(1, 2).unflatten(2, grid))
        return y

    pattern = halo_attention.pattern_of(  # type: ignore[attr-defined]
        q, k, v, grid=grid, block=module.block_size, halo=module.halo_size, scale=module.scale, pads=True,
        scaled_positions=module.scale_pos_embed, **tables,
    )  # fmt: skip
    return Mixing(pattern, v, finish, "halo", queries=q, keys=k)
