"""Reads RecurrentGemma's recurrent blocks of Hugging Face transformers: an RG-LRU behind a short convolution.

Each channel is a head with one number as its state. The map is that of the convolved values, with both gates held
fixed; the input gate and the factor √(1 − a²) are in it. What follows is the product with the other branch and the
output projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import carried, check_run, filtered, has, rounded
from workbench.kernels.recurrent import RecurrentPattern

_SHARPNESS = 8.0  # c of arXiv 2402.19427, eq. 3; fixed in the module


def _continues(module: Any, inputs: Mapping[str, Any]) -> bool:
    """The block keeps its states itself; a row that begins at position 0 forgets them, if it has several positions."""
    if not inputs.get("use_cache", True) or module.conv1d_state is None:
        return False
    at = inputs["position_ids"]
    begins = at.shape[1] > 1 and bool((at[:, 0] == 0).all())
    return not begins and module.conv1d_state.shape[0] == inputs["input_states"].shape[0]


def _held(module: Any, inputs: Mapping[str, Any], output: Any) -> dict[str, Tensor] | None:
    held = {"conv": module.conv1d_state, "state": module.rg_lru.recurrent_states}
    return None if any(t is None for t in held.values()) else held


@reader(
    "RecurrentGemmaRecurrentBlock", when=has("linear_x", "linear_y", "conv_1d", "rg_lru", "linear_out"),
    continues=_continues, follows=("conv_1d", "rg_lru"), state=_held,
)  # fmt: skip
def rg_lru(run: ModuleRun) -> Mixing:
    """The channels are the heads; they fade with a, and reset where positions begin again."""
    check_run(run)
    return _rg_lru(run, run.module, run.inputs["input_states"], run.inputs["position_ids"])


def _rg_lru(run: ModuleRun, module: Any, given: Tensor, position_ids: Tensor) -> Mixing:
    unit = module.rg_lru
    other = module.act_fn.forward(module.linear_y.forward(given))
    behind = carried(run, "conv") if given.shape[1] == 1 else None  # of several positions, it forgets those before
    x = filtered(module.conv_1d, module.linear_x.forward(given).transpose(1, 2), behind).transpose(1, 2)

    def gate(which: str) -> Tensor:
        weight, bias = (getattr(unit, f"{which}_gate_{part}") for part in ("weight", "bias"))
        blocks = x.unflatten(-1, weight.shape[:2])  # [batch, position, head, width]
        return torch.einsum("bnhi,hio->bnho", blocks, weight).add(bias).flatten(2).sigmoid()

    log_decay = -_SHARPNESS * gate("recurrent") * F.softplus(unit.recurrent_param)
    reset = (position_ids == 0)[..., None]
    size = torch.where(reset, 1.0, (1 - (2 * log_decay).exp()).sqrt())
    written = (gate("input") * size).transpose(1, 2)[..., None]
    log_decay = log_decay.masked_fill(reset, -torch.inf).transpose(1, 2)

    def finish(z: Tensor) -> Tensor:
        y = z.squeeze(-1).transpose(1, 2).to(x.dtype)
        out: Tensor = module.linear_out.forward(y * other)
        return out

    k, v = rounded(written), rounded(x.transpose(1, 2)[..., None])
    q = torch.ones_like(k)
    pattern = RecurrentPattern(q, k, rounded(log_decay), values=v)
    if (state := carried(run, "state")) is not None:
        pattern.before = pattern.from_state(state[:, :, None, None])
    return Mixing(pattern, v, finish, "rg_lru", queries=q, keys=k)
