"""Reads Mamba mixers of Hugging Face transformers as hidden attention, a map for each channel.

A mixer gives only its output, so its steps are taken again from its inputs and its own parameters, up to the scan: the
values x, the steps Δ, and A, B and C of the map that the scan applies to x. What follows the scan (the skip D·x, gate
and output projection) is `finish`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from workbench.hooks.configs import read
from workbench.hooks.nested import first_tensor
from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import (
    cached,
    carried,
    check_run,
    convolved,
    has_parts,
    rounded,
    step_size,
    unpadded,
)
from workbench.hooks.tap import Unshown
from workbench.kernels.state_space import SelectivePattern


@reader("MambaMixer", "FalconMambaMixer", "JambaMambaMixer", when=has_parts, state=cached)
def mamba(run: ModuleRun) -> Mixing:
    """The channels are the heads; C are the queries and B the keys."""
    check_run(run)
    return _selective(run, run.module, run.inputs["hidden_states"], run.inputs.get("attention_mask"))


@reader("ZambaMambaMixer", when=has_parts, state=cached)
def zamba(run: ModuleRun) -> Mixing:
    """As `mamba`, the channels in groups."""
    check_run(run)
    return _many_headed(run, run.module, run.inputs["hidden_states"], run.inputs.get("attention_mask"))


def _selective(run: ModuleRun, module: Any, hidden: Tensor, mask: Tensor | None) -> Mixing:
    """Mamba: Δ, B and C of every channel come from the convolved x; some releases norm them first."""
    projected = module.in_proj.forward(unpadded(hidden, mask)).transpose(1, 2)
    x, gate = projected.chunk(2, dim=1)
    x = unpadded(convolved(module, x, carried(run, "conv")), mask)
    low, B, C = module.x_proj.forward(x).split(
        [module.time_step_rank, module.ssm_state_size, module.ssm_state_size], dim=-1
    )
    if hasattr(module, "dt_layernorm"):
        low, B, C = (
            norm.forward(t)
            for norm, t in ((module.dt_layernorm, low), (module.b_layernorm, B), (module.c_layernorm, C))
        )
    if read(read(module, "config"), "_is_quantized") is not None:  # then the weight is no plain matrix
        steps = (module.dt_proj.forward(low) - module.dt_proj.bias).transpose(1, 2)
    else:
        steps = module.dt_proj.weight @ low.transpose(1, 2)
    delta = step_size(steps, module.dt_proj.bias, (-1, 1))
    return _of_channels(
        run, module, x.transpose(1, 2), gate, delta, module.A_log, module.D, B[:, None], C[:, None], hidden
    )


def _many_headed(run: ModuleRun, module: Any, hidden: Tensor, mask: Tensor | None) -> Mixing:
    """Zamba's Mamba: groups of channels, each with projections of its own to Δ, B and C."""
    b, n, _ = hidden.shape
    projected = module.in_proj.forward(unpadded(hidden, mask)).transpose(1, 2)
    x, gate = projected.reshape(b, -1, 2, n).unbind(2)
    x = unpadded(convolved(module, x, carried(run, "conv")), mask).transpose(1, 2)
    grouped = x.reshape(b, module.n_mamba_heads, module.mamba_head_dim, n)
    low, B, C = (module.x_proj_weight @ grouped).transpose(-1, -2).split(
        [module.time_step_rank, module.ssm_state_size, module.ssm_state_size], dim=-1
    )  # fmt: skip
    steps = (module.dt_proj_weight @ low.transpose(-1, -2)).flatten(1, 2)
    bias = None if module.dt_proj_bias is None else module.dt_proj_bias.flatten()
    delta = step_size(steps, bias, (-1, 1))
    return _of_channels(run, module, x, gate, delta, module.A_log.flatten(0, 1), module.D.flatten(), B, C, hidden)


def _of_channels(
    run: ModuleRun,
    module: Any,
    x: Tensor,
    gate: Tensor,
    delta: Tensor,
    A_log: Tensor,
    D: Tensor,
    B: Tensor,
    C: Tensor,
    hidden: Tensor,
) -> Mixing:
    """The map of a Mamba whose x, gate and delta are [batch, channel, position]."""

    def finish(z: Tensor) -> Tensor:
        y = (z.squeeze(-1) + x * D.float()[:, None]) * F.silu(gate)
        out: Tensor = module.out_proj.forward(y.transpose(1, 2).to(hidden.dtype))
        return out

    B, v = rounded(B), rounded(x)[..., None]
    pattern = SelectivePattern(delta, -A_log.float().exp(), B, C, values=v)
    mixing = Mixing(pattern, v, finish, "mamba", queries=C, keys=B)
    if (state := carried(run, "state")) is not None:
        pattern.before = pattern.from_state(state.flatten(1, -2))
        _check_kept(run, mixing)
    return mixing


def _check_kept(run: ModuleRun, mixing: Mixing) -> None:
    """Refuse a run that has dropped the state which it was given: over several positions their scan begins anew.

    Raises:
        Unshown: what it gave is nearer to what it would give without the state.
    """
    pattern, v, given = mixing.pattern, mixing.values, first_tensor(run.output)
    if v.shape[2] == 1 or given is None:
        return
    off = [(mixing.finish(z).float() - given[0].float()).abs().max() for z in (pattern.outputs(v), pattern.apply(v))]
    if bool(off[1] < off[0]):
        raise Unshown(
            "the mixer was given the state of earlier positions and has dropped it: over several positions at once its "
            "scan begins anew, so that the model gives something else than over the whole text",
            site=run.site,
            hint="run the text in one forward, or go on from a cache by one position at a time",
        )
