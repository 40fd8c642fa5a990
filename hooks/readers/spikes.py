"""Reads spiking self-attention of the package spikingjelly: each step of each example is an entry of the batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import has
from workbench.hooks.tap import Unshown
from workbench.kernels.linear import LinearPattern

_NEURONS = ("qkv_lif", "attn_lif", "proj_lif")


def _charged(module: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether some of its neurons hold a potential from an earlier forward."""
    return any(not _at_rest(getattr(module, name)) for name in _NEURONS)


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
    "spikingjelly.activation_based.layer.attention.SpikingSelfAttention", kind="self", continues=_charged,
    when=has("qkv_conv_bn", "proj_conv_bn", "num_heads", "scale", *_NEURONS), follows=_NEURONS,
)  # fmt: skip
def spiking(run: ModuleRun) -> Mixing:
    """Positions are the last axis of [step, batch, channel, token]."""
    module: Any = run.module
    x: Tensor = run.inputs["x_seq"]
    if run.continued:
        raise Unshown(
            "its neurons hold potentials of an earlier forward, which no map of this one shows",
            site=run.site,
            hint="call spikingjelly.activation_based.functional.reset_net(model) before each forward",
        )
    spikes = _fired(module.qkv_lif, module.qkv_conv_bn.forward(x))  # [step, batch, 3 · channel, token]
    split = spikes.unflatten(2, (3, module.num_heads, -1)).permute(2, 1, 0, 3, 5, 4).flatten(1, 2)
    q, k, v = split.unbind(0)  # [batch · step, head, token, width]
    scale = float(module.scale)

    def finish(z: Tensor) -> Tensor:
        current = z.to(x.dtype).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1).mT.flatten(2, 3)
        y: Tensor = _fired(module.proj_lif, module.proj_conv_bn.forward(_fired(module.attn_lif, current)))
        return y

    return Mixing(LinearPattern(q * scale, k, values=v), v, finish, "spiking", queries=q, keys=k)
