"""The weights of an attention layer, found by value, and a Mamba-2 layer that starts from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.analysis.circuits.model.layers import find_projection
from workbench.analysis.logits.asked import check_model
from workbench.analysis.logits.writers import find_readout_of, plain_joins_of
from workbench.errors import AttachError
from workbench.hooks.heads import block_of
from workbench.hooks.projections import projection_slices
from workbench.inputs import device_for_inputs, without_cache
from workbench.mechanisms.matvlm.layer import Mamba2
from workbench.session.workbench import Workbench

_SHORT = 8  # tokens that are enough to find a layer's parts


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of an attention layer, as it applies them to its own input.

    Attributes:
        q: [head, width, d_model]. k, v: [kv head, width, d_model]. out: [head, width, d_model].
        q_bias, k_bias, v_bias: [head or kv head, width]; None without. out_bias: [d_model]; None without.
        site: whose they are.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    out_bias: Tensor | None = None
    site: str = ""

    def __post_init__(self) -> None:
        (h, width, d_model), kv = self.q.shape, len(self.k)
        if self.out.shape != self.q.shape or self.k.shape != self.v.shape or self.k.shape != (kv, width, d_model):
            raise AttachError(
                f"queries {list(self.q.shape)}, keys {list(self.k.shape)}, values {list(self.v.shape)} and what is "
                f"written {list(self.out.shape)} must be [head, width, d_model] of one width",
                site=self.site or None,
                hint="a state-space head reads and writes with one width: heads of other shapes have no such student",
            )
        if kv == 0 or h % kv:
            raise AttachError(f"{kv} kv heads do not divide {h} heads", site=self.site or None)


def attention_weights(wb: Workbench, site: str | int) -> AttentionWeights:
    """The projections of a language model's site, found by value in one forward of a few tokens.

    Raises:
        AttachError: they are not the columns of linear modules that read the block's input, as it is or through a norm.
    """
    check_model(wb)
    found = wb.sites[site]
    with torch.inference_mode(mode=False), torch.enable_grad():
        ids = (3 + (5 * torch.arange(_SHORT)) % 8)[None].to(device_for_inputs(wb.model))
        seen, _, _, _ = find_readout_of(wb, {"input_ids": ids, **without_cache(wb.model)}, with_gradients=True)
        block = block_of(wb.model, wb.sites, found.name)
        if not block:
            raise AttachError("the attention is in no block of a list of blocks", site=found.name)
        (joint,) = plain_joins_of(seen, [found])
        projections = {
            part: find_projection(wb.model, seen, found, part, seen.given[block], f"{block}.", "the block's input")
            for part in "qkv"
        }
    width = projections["v"].columns.shape[1]
    weight = {part: p.weight.detach().clone() for part, p in projections.items()}
    bias = {part: None if p.bias is None else p.bias.clone() for part, p in projections.items()}
    written = projection_slices(joint.module, joint.n_heads, width).detach().clone()
    last = getattr(joint.module, "bias", None)
    return AttentionWeights(
        weight["q"], weight["k"], weight["v"], written, bias["q"], bias["k"], bias["v"],
        None if last is None else last.detach().clone(), found.name,
    )  # fmt: skip


def seed_mamba2(attention: AttentionWeights, *, conv: int = 4, gated: bool = True, seed: int = 0) -> Mamba2:
    """A Mamba-2 layer whose x, B, C and output are an attention layer's values, keys, queries and output projection.

    The rest is drawn: gate, step sizes, rates, convolution. Positions that turn queries and keys are not carried over;
    order comes from decay and convolution. So the layer is no linear attention at first, only one whose heads read and
    write where the teacher's do (MaTVLM, arXiv 2503.13440, after arXiv 2408.15237).

    Args:
        attention: see `attention_weights`.
        conv, gated: as `Mamba2` takes them.

    >>> eye = torch.eye(4).view(2, 2, 4)
    >>> layer = seed_mamba2(AttentionWeights(q=eye, k=2 * eye, v=3 * eye, out=eye))
    >>> [float(part.abs().sum()) for part in layer.in_proj.weight[4:16].detach().split(4)]  # x, B, C
    [12.0, 8.0, 4.0]
    """
    n_heads, width, d_model = attention.q.shape
    parts = {"q": attention.q_bias, "k": attention.k_bias, "v": attention.v_bias, "out": attention.out_bias}
    layer = Mamba2(
        d_model, n_heads, width, len(attention.k), conv=conv, gated=gated,
        bias=any(bias is not None for bias in parts.values()), generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    with torch.no_grad():
        _, x, B, C, _ = layer.in_proj.weight.split(layer.widths)
        for rows, weight in ((x, attention.v), (B, attention.k), (C, attention.q)):
            rows.copy_(weight.flatten(0, 1))
        layer.out_proj.weight.copy_(attention.out.flatten(0, 1).T)
        if layer.in_proj.bias is not None:
            _, x, B, C, _ = layer.in_proj.bias.split(layer.widths)
            for rows, bias in ((x, parts["v"]), (B, parts["k"]), (C, parts["q"])):
                rows.copy_(torch.zeros_like(rows) if bias is None else bias.flatten())
            out = layer.out_proj.bias
            out.copy_(torch.zeros_like(out) if parts["out"] is None else parts["out"])
    return layer.to(attention.q)
