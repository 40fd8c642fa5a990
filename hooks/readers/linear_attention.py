"""Reads linear attention over images: Sana's in diffusion transformers, and that of its autoencoder, of diffusers.

Rectified queries and keys are their own features, and rows are divided by their sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.hooks.readers.registered import Mixing, ModuleRun, join_heads, reader
from workbench.hooks.readers.state_space import foreign, has
from workbench.kernels.linear import LinearPattern

_EPS = 1e-15  # added to the sums, in the module itself


def _is_sana(module: Any) -> bool:
    return type(getattr(module, "processor", None)).__name__ == "SanaLinearAttnProcessor2_0"


@reader("diffusers.models.attention_processor.Attention", kind="self", when=_is_sana)
def sana(run: ModuleRun) -> Mixing:
    """Every position sees every other; the projection follows."""
    module: Any = run.module
    hidden, others = run.inputs["hidden_states"], run.inputs.get("encoder_hidden_states")
    try:
        read = hidden if others is None else others
        q, k, v = module.to_q.forward(hidden), module.to_k.forward(read), module.to_v.forward(read)
        q, k = (t if norm is None else norm.forward(t) for norm, t in ((module.norm_q, q), (module.norm_k, k)))
        q, k, v = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2).float() for t in (q, k, v))
        project, drop = module.to_out
    except AttributeError as error:
        raise foreign(run, error) from error

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
    try:
        last = hidden.movedim(1, -1)
        qkv = torch.cat([part.forward(last) for part in (module.to_q, module.to_k, module.to_v)], dim=3).movedim(-1, 1)
        whole = torch.cat([qkv, *(scale.forward(qkv) for scale in module.to_qkv_multiscale)], dim=1)
        split = whole.float().reshape(len(hidden), -1, 3 * module.attention_head_dim, height * width)
        q, k, v = split.transpose(2, 3).chunk(3, dim=-1)
    except AttributeError as error:
        raise foreign(run, error) from error

    def finish(z: Tensor) -> Tensor:
        y = z.to(hidden.dtype).transpose(2, 3).reshape(len(hidden), -1, height, width)
        y = module.to_out.forward(y.movedim(1, -1))
        if module.norm_type == "rms_norm":
            y = module.norm_out.forward(y).movedim(-1, 1)
        else:
            y = module.norm_out.forward(y.movedim(-1, 1))
        return y + hidden if module.residual_connection else y

    return _rectified(q, k, v, finish, eps=module.eps)


def _rectified(q: Tensor, k: Tensor, v: Tensor, finish: Any, eps: float = _EPS) -> Mixing:
    q, k = q.relu(), k.relu()
    eta = (q * k.sum(2, keepdim=True)).sum(-1)
    whole = bool((eta > 0).all())  # a row whose query is nowhere above zero has no weight at all
    pattern = LinearPattern(q, k, eta + eps, values=v, normalised=whole)
    return Mixing(pattern, v, finish, "linear_attention", queries=q, keys=k)
