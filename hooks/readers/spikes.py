"""Reads attention of the package spikingjelly's spiking transformers: each step of each example is a batch entry."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import has
from workbench.hooks.tap import Unshown
from workbench.kernels.gates import GatePattern, gate_map
from workbench.kernels.linear import LinearPattern

_NEURONS, _GATING = ("qkv_lif", "attn_lif", "proj_lif"), ("qk_lif", "attn_lif", "proj_lif")


def _charged(neurons: tuple[str, ...]) -> Callable[[nn.Module, Mapping[str, Any]], bool]:
    """Whether some of a module's neurons hold a potential from an earlier forward."""
    return lambda module, inputs: any(not _at_rest(getattr(module, name)) for name in neurons)


def _check_rest(run: ModuleRun) -> None:
    """Refuse a run that went on from potentials."""
    if run.continued:
        raise Unshown(
            "its neurons hold potentials of an earlier forward, which no map of this one shows",
            site=run.site,
            hint="call spikingjelly.activation_based.functional.reset_net(model) before each forward",
        )


def _at_rest(neurons: Any) -> bool:
    rest = 0.0 if neurons.v_reset is None else neurons.v_reset
    return bool((neurons.v == rest).all()) if isinstance(neurons.v, Tensor) else neurons.v == rest


def _fired(neurons: Any, current: Tensor) -> Tensor:
    """What these neurons give from rest on, without a trace in them."""
    fresh = copy.copy(neurons)
    fresh.__dict__["_memories"] = dict(neurons._memories)
    fresh.reset()
    spikes: Tensor = fresh.forward(current)
    return spikes


@reader(
    "spikingjelly.activation_based.layer.attention.SpikingSelfAttention", kind="self",
    continues=_charged(_NEURONS),
    when=has("qkv_conv_bn", "proj_conv_bn", "num_heads", "scale", *_NEURONS), follows=_NEURONS,
)  # fmt: skip
def spiking(run: ModuleRun) -> Mixing:
    """Positions are the last axis of [step, batch, channel, token]."""
    module: Any = run.module
    x: Tensor = run.inputs["x_seq"]
    _check_rest(run)
    spikes = _fired(module.qkv_lif, module.qkv_conv_bn.forward(x))  # [step, batch, 3 · channel, token]
    split = spikes.unflatten(2, (3, module.num_heads, -1)).permute(2, 1, 0, 3, 5, 4).flatten(1, 2)
    q, k, v = split.unbind(0)  # [batch · step, head, token, width]
    scale = float(module.scale)

    def finish(z: Tensor) -> Tensor:
        current = z.to(x.dtype).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1).mT.flatten(2, 3)
        y: Tensor = _fired(module.proj_lif, module.proj_conv_bn.forward(_fired(module.attn_lif, current)))
        return y

    return Mixing(LinearPattern(q * scale, k, values=v), v, finish, "spiking", queries=q, keys=k)


@reader(
    "spikingjelly.activation_based.layer.attention.QKAttention", kind="gate", continues=_charged(_GATING),
    when=has("qk_conv_bn", "proj_conv_bn", "num_heads", "sum_dim", *_GATING), follows=_GATING,
)  # fmt: skip
def query_gates(run: ModuleRun) -> Mixing:
    """Q-K attention (QKFormer, arXiv 2403.16552): spikes of summed queries let keys through, by token or by channel."""
    module: Any = run.module
    x: Tensor = run.inputs["x_seq"]
    _check_rest(run)
    spikes = _fired(module.qk_lif, module.qk_conv_bn.forward(x)).unflatten(2, (2, module.num_heads, -1))
    q, k = spikes.unbind(2)  # [step, batch, head, channel, token]
    opened = _fired(module.attn_lif, q.sum(module.sum_dim, keepdim=True)).transpose(0, 1).flatten(0, 1)
    let = k.transpose(0, 1).flatten(0, 1)  # [batch · step, head, channel, token]
    if opened.shape[2] == 1:  # by token: all channels of a head have the same factor
        values = let.mT
        pattern = GatePattern(opened[:, :, 0], x.shape[3], values=values)
    else:
        pattern, values = gate_map(let.flatten(1, 2), opened.flatten(1, 2), channels=1)

    def finish(z: Tensor) -> Tensor:
        current = z.mT.flatten(1, 2).to(x.dtype).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)
        y: Tensor = _fired(module.proj_lif, module.proj_conv_bn.forward(current))
        return y

    return Mixing(pattern, values, finish, "query_gates")
