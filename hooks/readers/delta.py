"""Reads layers of gated delta rules of Hugging Face transformers: Gated DeltaNet and Kimi delta attention.

The map is that of the values after their short convolution and activation, with keys, gates and steps held fixed; the
convolution reaches back a few positions by itself. What follows the map (a norm for each head that the gate scales, and
the output projection) is `finish`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import (
    cached,
    carried,
    check_run,
    convolved,
    has,
    rounded,
    unpadded,
)
from workbench.kernels.recurrent import RecurrentPattern

_NORM_EPS = 1e-6  # of unit queries and keys, in all of them


@reader(
    "Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet", "Qwen4ExpTextGatedDeltaNet",
    "OlmoHybridGatedDeltaNet", when=has("conv1d", "A_log", "dt_bias", "head_k_dim", "head_v_dim"), state=cached,
)  # fmt: skip
def gated_delta(run: ModuleRun) -> Mixing:
    """Queries and keys have unit length; each head has one decay, and a step between 0 and 1 (or 2)."""
    check_run(run)
    return _gated_delta(run, run.module, _given(run))


@reader(
    "KimiLinearDeltaAttention", "BailingHybridDeltaAttention", "Glm5NextTextLinearAttention",
    when=has("conv1d", "forget_gate", "b_proj", "o_norm", "head_dim"), state=cached,
)  # fmt: skip
def kimi_delta(run: ModuleRun) -> Mixing:
    """As `gated_delta`, with a decay for each channel of the state."""
    check_run(run)
    return _kimi_delta(run, run.module, _given(run))


def _given(run: ModuleRun) -> Tensor:
    return unpadded(run.inputs["hidden_states"], run.inputs.get("attention_mask"))


def _gated_delta(run: ModuleRun, module: Any, hidden: Tensor) -> Mixing:
    if hasattr(module, "in_proj_qkvz"):  # Qwen3-Next
        *qkv, gate, b, a = module.fix_query_key_value_ordering(
            module.in_proj_qkvz.forward(hidden), module.in_proj_ba.forward(hidden)
        )
        mixed = torch.cat([t.flatten(2) for t in qkv], dim=-1)
    elif hasattr(module, "in_proj_qkv"):  # Qwen3.5
        mixed, gate, b, a = (
            getattr(module, f"in_proj_{part}").forward(hidden) for part in ("qkv", "z", "b", "a")
        )  # fmt: skip
    else:  # OLMo Hybrid
        mixed = torch.cat([getattr(module, f"{part}_proj").forward(hidden) for part in "qkv"], dim=-1)
        gate, b, a = (getattr(module, f"{part}_proj").forward(hidden) for part in "gba")
    beta = b.sigmoid() * (2.0 if getattr(module, "allow_neg_eigval", False) else 1.0)
    log_decay = -module.A_log.float().exp() * F.softplus(a.float() + module.dt_bias)
    out = getattr(module, "out_proj", None) or module.o_proj
    norm = getattr(module, "norm", None) or module.o_norm
    widths = (module.key_dim, module.key_dim, module.value_dim)
    q, k, v = _heads(run, mixed, widths, (module.head_k_dim, module.head_k_dim, module.head_v_dim))
    return _of_rule(run, q, k, v, log_decay.transpose(1, 2), beta, gate, norm, out, "gated_delta")


def _kimi_delta(run: ModuleRun, module: Any, hidden: Tensor) -> Mixing:
    mixed = torch.cat([getattr(module, f"{part}_proj").forward(hidden) for part in "qkv"], dim=-1)
    log_decay = module.forget_gate.forward(hidden).transpose(1, 2)  # [batch, head, position, d]
    beta = module.b_proj.forward(hidden).sigmoid()
    one = hasattr(module, "g_proj")
    gate = module.g_proj.forward(hidden) if one else module.g_b_proj.forward(module.g_a_proj.forward(hidden))
    q, k, v = _heads(run, mixed, (module.qkv_dim,) * 3, (module.head_dim,) * 3)
    return _of_rule(run, q, k, v, log_decay, beta, gate, module.o_norm, module.o_proj, "kimi_delta")


def _heads(run: ModuleRun, mixed: Tensor, widths: tuple[int, ...], per_head: tuple[int, ...]) -> list[Tensor]:
    """q, k and v [batch, head, position, d] after the convolution."""
    parts = convolved(run.module, mixed.transpose(1, 2), carried(run, "conv")).split(list(widths), dim=-1)
    return [t.unflatten(-1, (-1, d)).transpose(1, 2) for t, d in zip(parts, per_head, strict=True)]


def _of_rule(
    run: ModuleRun, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gate: Tensor, norm: Any, out: Any,
    kernel: str,
) -> Mixing:  # fmt: skip
    """Their rules compute in float32, whatever the model's dtype is."""
    dtype = v.dtype

    def finish(z: Tensor) -> Tensor:
        y = z.transpose(1, 2).to(dtype)
        y = norm.forward(y.flatten(0, 2), gate.reshape(-1, y.shape[-1])).view(y.shape)
        found: Tensor = out.forward(y.flatten(2))
        return found

    q, k, v = _unit(q) * q.shape[-1] ** -0.5, _unit(k), rounded(v)
    pattern = RecurrentPattern(q, k, log_decay.float(), beta.transpose(1, 2).float(), values=v)
    if (state := carried(run, "state")) is not None:
        pattern.before = pattern.from_state(state)
    return Mixing(pattern, v, finish, kernel, queries=q, keys=k)


def _unit(t: Tensor) -> Tensor:
    t = t.float()
    return t * torch.rsqrt((t * t).sum(-1, keepdim=True) + _NORM_EPS)
