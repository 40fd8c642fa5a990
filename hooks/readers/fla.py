"""Reads layers of flash-linear-attention: gated linear attention, retention, and RWKV-7's time mixing.

Their kernels run on GPUs, whose results are read here by the recurrences that they stand for: with a decay for each
channel of the state (arXiv 2312.06635), with a constant one for each head (2307.08621), and with a generalised delta
rule (2503.14456). A norm for each head, a gate and the output projection follow the map. The package's caches are not
read: a call that goes on from one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import check_run, has, unpadded
from workbench.hooks.tap import Unshown
from workbench.kernels.lightning import LightningPattern
from workbench.kernels.patterns import Pattern
from workbench.kernels.recurrent import GeneralDeltaPattern, RecurrentPattern

_SMALLEST_DECAY = -0.6065306597126334  # −exp(−1/2): RWKV-7's decays are not faster


def _continues(module: nn.Module, inputs: Mapping[str, Any]) -> bool:
    cache, layer = inputs.get("past_key_values"), getattr(module, "layer_idx", None)
    return cache is not None and (layer is None or len(cache) > layer)


@reader("GatedLinearAttention", when=has("gk_proj", "gate_logit_normalizer", "head_k_dim"), continues=_continues,
        follows=("q_conv1d", "k_conv1d", "v_conv1d"))  # fmt: skip
def gated_linear(run: ModuleRun) -> Mixing:
    """Each channel of the state has a decay of its own."""
    check_run(run)
    module: Any = run.module
    hidden = _whole(run)
    q, k, v = _projected(run, module, hidden)
    decay = F.logsigmoid(module.gk_proj.forward(hidden)) / module.gate_logit_normalizer
    decay = decay if module.clamp_min is None else decay.clamp_min(module.clamp_min)
    decay = _heads(decay, module.head_k_dim, module.num_kv_groups)
    q = q * q.shape[-1] ** -0.5
    pattern = RecurrentPattern(q, k, decay, values=v)
    return _gated(module, hidden, pattern, q, k, v, "gated_linear")


@reader("MultiScaleRetention", when=has("rotary", "head_k_dim", "num_kv_groups"), continues=_continues,
        follows=("q_conv1d", "k_conv1d", "v_conv1d"))  # fmt: skip
def retention(run: ModuleRun) -> Mixing:
    """Head h decays by 1 − 2^(−5 − h) at each position; queries and keys turn with theirs."""
    check_run(run)
    module: Any = run.module
    hidden = _whole(run)
    q, k, v = _projected(run, module, hidden)
    turned = module.rotary.forward(
        q.transpose(1, 2), k.transpose(1, 2), seqlen_offset=0, max_seqlen=q.shape[2], cu_seqlens=None
    )
    q, k = (t.transpose(1, 2) for t in turned)
    decay = 1 - 2.0 ** (-5 - torch.arange(q.shape[1], dtype=torch.float64))
    q = q * q.shape[-1] ** -0.5
    return _gated(module, hidden, LightningPattern(q, k, decay, values=v), q, k, v, "retention")


@reader("RWKV7Attention", when=has("x_r", "w_lora", "a_lora", "k_k", "r_k", "g_norm"), continues=_continues,
        follows=("time_shift",))  # fmt: skip
def rwkv7(run: ModuleRun) -> Mixing:
    """The map is that of the values after the token shift, mixed with the first layer's."""
    check_run(run)
    module: Any = run.module
    mask = run.inputs.get("attention_mask")
    hidden = unpadded(run.inputs["hidden_states"], mask)
    difference = F.pad(hidden, (0, 0, 1, -1)) - hidden

    def shifted(part: str) -> Tensor:
        return hidden + difference * getattr(module, f"x_{part}")

    r, k, v = (getattr(module, f"{part}_proj").forward(shifted(part)) for part in "rkv")
    log_decay = _SMALLEST_DECAY * module.w_lora.forward(shifted("w")).sigmoid()
    if module.layer_idx != 0:
        v = torch.lerp(v, run.inputs["v_first"], module.v_lora.forward(shifted("v")).sigmoid())
    rate, gate = module.a_lora.forward(shifted("a")).sigmoid(), module.g_lora.forward(shifted("g"))
    removed = F.normalize((k * module.k_k).unflatten(-1, (-1, module.head_dim)), dim=-1).transpose(1, 2)
    k = k + k * (rate - 1) * module.k_a
    v = unpadded(v, mask)
    r, k, log_decay, rate = (_heads(t, module.head_dim) for t in (r, k, log_decay, rate))
    v = _heads(v, module.head_v_dim)
    bonus = (r * k * module.r_k[:, None]).sum(-1, keepdim=True) * v
    pattern = GeneralDeltaPattern(r, k, log_decay, a=-removed, b=removed * rate, values=v)

    def finish(z: Tensor) -> Tensor:
        y = z.transpose(1, 2).flatten(2).to(v.dtype)
        y = module.g_norm.forward(y) if module.fuse_norm else module.g_norm.forward(y.flatten(0, 1)).view_as(y)
        out: Tensor = module.o_proj.forward((y + bonus.transpose(1, 2).flatten(2)) * gate)
        return out

    return Mixing(pattern, v, finish, "rwkv7", queries=r, keys=k)


def _whole(run: ModuleRun) -> Tensor:
    """The hidden states, of rows without padding: these layers take it out, and run on packed rows.

    Raises:
        Unshown: there is padding.
    """
    mask = run.inputs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise Unshown(
            "the layer takes padding out and runs its rows as one packed sequence",
            site=run.site,
            hint="capture one prompt at a time, or prompts of one length",
        )
    hidden: Tensor = run.inputs["hidden_states"]
    return hidden


def _projected(run: ModuleRun, module: Any, hidden: Tensor) -> list[Tensor]:
    """q, k and v [batch, head, position, d] behind their short convolutions and feature map, before any rotation."""
    found = []
    for part, width in (("q", module.head_k_dim), ("k", module.head_k_dim), ("v", module.head_v_dim)):
        t = getattr(module, f"{part}_proj").forward(hidden)
        if module.use_short_conv:
            conv = getattr(module, f"{part}_conv1d")
            t = F.conv1d(t.mT, conv.weight, conv.bias, padding=conv.weight.shape[-1] - 1, groups=t.shape[-1])
            t = F.silu(t[..., : hidden.shape[1]]).mT
        t = _heads(t, width, 1 if part == "q" else module.num_kv_groups)
        found.append(t if part == "v" or module.feature_map_fn is None else module.feature_map_fn(t))
    return found


def _heads(t: Tensor, width: int, group: int = 1) -> Tensor:
    return t.unflatten(-1, (-1, width)).transpose(1, 2).repeat_interleave(group, dim=1)


def _gated(module: Any, hidden: Tensor, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Mixing:
    gate = module.g_proj.forward(hidden) if module.use_output_gate else None

    def finish(z: Tensor) -> Tensor:
        y = z.transpose(1, 2).to(hidden.dtype)
        if gate is not None and module.fuse_norm_and_gate:
            y = module.g_norm_swish_gate.forward(y, gate.unflatten(-1, y.shape[2:])).flatten(2)
        else:
            y = module.g_norm.forward(y).flatten(2)
            y = y if gate is None else y * module.gate_fn(gate)
        out: Tensor = module.o_proj.forward(y)
        return out

    return Mixing(pattern, v, finish, kernel, queries=q, keys=k)
