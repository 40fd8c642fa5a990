"""Reads linear attention over images: Sana's and its autoencoder's, of diffusers, and that of diffusion U-Nets.

In Sana rectified queries and keys are their own features, and rows are divided by their sums. In "efficient attention"
(arXiv 1812.01243), which U-Nets took up, queries pass a softmax over their channels and keys one over the positions, so
that rows sum to one by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks.readers.registered import Mixing, ModuleRun, join_heads, reader
from workbench.hooks.readers.state_space import has
from workbench.kernels.linear import LinearPattern

_EPS = 1e-15  # added to the sums, in the module itself


def _is_sana(module: Any) -> bool:
    return type(getattr(module, "processor", None)).__name__ == "SanaLinearAttnProcessor2_0"


@reader("diffusers.models.attention_processor.Attention", kind="self", when=_is_sana)
def sana(run: ModuleRun) -> Mixing:
    """Every position sees every other; the projection follows."""
    module: Any = run.module
    hidden, others = run.inputs["hidden_states"], run.inputs.get("encoder_hidden_states")
    read = hidden if others is None else others
    q, k, v = module.to_q.forward(hidden), module.to_k.forward(read), module.to_v.forward(read)
    q, k = (t if norm is None else norm.forward(t) for norm, t in ((module.norm_q, q), (module.norm_k, k)))
    q, k, v = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2).float() for t in (q, k, v))
    project, drop = module.to_out

    def finish(z: Tensor) -> Tensor:
        y: Tensor = drop.forward(project.forward(join_heads(z).to(hidden.dtype)))
        return y.clip(-65504, 65504) if hidden.dtype == torch.float16 else y

    return _rectified(q, k, v, finish)


@reader(
    "diffusers.models.attention_processor.SanaMultiscaleLinearAttention", kind="self",
    when=has("to_q", "to_qkv_multiscale", "nonlinearity", "norm_out", "attention_head_dim"),
    follows=("to_qkv_multiscale",),
)  # fmt: skip
def sana_multiscale(run: ModuleRun) -> Mixing:
    """The positions are those of an image, row by row; half of the heads see it through a convolution first."""
    module: Any = run.module
    hidden = run.inputs["hidden_states"]
    height, width = hidden.shape[-2:]
    last = hidden.movedim(1, -1)
    qkv = torch.cat([part.forward(last) for part in (module.to_q, module.to_k, module.to_v)], dim=3).movedim(-1, 1)
    whole = torch.cat([qkv, *(scale.forward(qkv) for scale in module.to_qkv_multiscale)], dim=1)
    split = whole.float().reshape(len(hidden), -1, 3 * module.attention_head_dim, height * width)
    q, k, v = split.transpose(2, 3).chunk(3, dim=-1)

    def finish(z: Tensor) -> Tensor:
        y = z.to(hidden.dtype).transpose(2, 3).reshape(len(hidden), -1, height, width)
        y = module.to_out.forward(y.movedim(1, -1))
        if module.norm_type == "rms_norm":
            y = module.norm_out.forward(y).movedim(-1, 1)
        else:
            y = module.norm_out.forward(y.movedim(-1, 1))
        return y + hidden if module.residual_connection else y

    return _rectified(q, k, v, finish, eps=module.eps)


@reader("EfficientAttention", kind="self",
        when=has("keys", "queries", "values", "reprojection", "head_count"))  # fmt: skip
def efficient(run: ModuleRun) -> Mixing:
    """The positions are those of an image, row by row, which the module adds what it finds to."""
    module: Any = run.module
    x = _image(run)
    q, k, v = (
        part.forward(x).flatten(2).unflatten(1, (module.head_count, -1)).mT
        for part in (module.queries, module.keys, module.values)
    )

    def finish(z: Tensor) -> Tensor:
        y: Tensor = module.reprojection.forward(z.mT.flatten(1, 2).unflatten(2, x.shape[2:]).to(x.dtype))
        return y + x

    return _softmaxed(q, k, v, finish)


def _is_unet_linear(module: Any) -> bool:
    parts = has("to_qkv", "to_out", "heads", "scale")(module) and not hasattr(module, "mem_kv")
    return parts and isinstance(module.to_qkv, nn.Conv2d) and module.to_qkv.kernel_size == (1, 1)


@reader("LinearAttention", kind="self", when=_is_unet_linear)
def unet_linear(run: ModuleRun) -> Mixing:
    """As `efficient`, behind the module's norm where it has one; its queries' scale stands before the projection."""
    module: Any = run.module
    x = _image(run)
    given = module.norm.forward(x) if hasattr(module, "norm") else x
    split = (t.flatten(2).unflatten(1, (module.heads, -1)).mT for t in module.to_qkv.forward(given).chunk(3, dim=1))
    q, k, v = split

    def finish(z: Tensor) -> Tensor:
        y = (z * module.scale).mT.flatten(1, 2).unflatten(2, x.shape[2:])
        out: Tensor = module.to_out.forward(y.to(x.dtype))
        return out

    return _softmaxed(q, k, v, finish)


def _image(run: ModuleRun) -> Tensor:
    """The only tensor [batch, channel, height, width] that a module was given."""
    given = [value for value in run.inputs.values() if isinstance(value, Tensor)]
    if len(given) != 1 or given[0].dim() != 4:
        shapes = ", ".join(str(list(t.shape)) for t in given) or "none"
        raise CaptureError(f"one image [batch, channel, height, width] is needed, not {shapes}", site=run.site)
    return given[0]


def _softmaxed(q: Tensor, k: Tensor, v: Tensor, finish: Any) -> Mixing:
    q, k = q.softmax(-1), k.softmax(2)
    return Mixing(LinearPattern(q, k, values=v, normalised=True), v, finish, "efficient_attention", queries=q, keys=k)


def _rectified(q: Tensor, k: Tensor, v: Tensor, finish: Any, eps: float = _EPS) -> Mixing:
    q, k = q.relu(), k.relu()
    eta = (q * k.sum(2, keepdim=True)).sum(-1)
    whole = bool((eta > 0).all())  # a row whose query is nowhere above zero has no weight at all
    pattern = LinearPattern(q, k, eta + eps, values=v, normalised=whole)
    return Mixing(pattern, v, finish, "linear_attention", queries=q, keys=k)
