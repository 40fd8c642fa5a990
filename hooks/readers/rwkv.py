"""Reads RWKV's time mixing of Hugging Face transformers, a softmax over the past for each channel.

The map is that of the values after the token shift, which takes each from its own position and the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import check_run, has, rounded
from workbench.kernels.recurrent import WKVPattern

_NOTHING = -1e29  # the largest score that the state holds where it has seen no key


def _continues(module: nn.Module, inputs: Mapping[str, Any]) -> bool:
    state: Any = inputs.get("state")
    return state is not None and bool((state[4][:, :, module.layer_id] > _NOTHING).any())


@reader(
    "RwkvSelfAttention", when=has("time_decay", "time_first", "time_mix_key", "receptance"), continues=_continues,
    follows=("time_shift",),
)  # fmt: skip
def rwkv(run: ModuleRun) -> Mixing:
    """The channels are the heads; the receptance and the output projection follow."""
    check_run(run)
    module: Any = run.module
    hidden = run.inputs["hidden"]
    before = F.pad(hidden, (0, 0, 1, -1))

    def shifted(part: str) -> Tensor:
        share = getattr(module, f"time_mix_{part}")
        found: Tensor = getattr(module, part).forward(hidden * share + before * (1 - share))
        return found

    gate, k, v = shifted("receptance").sigmoid(), shifted("key").transpose(1, 2), shifted("value").transpose(1, 2)
    rate, bonus = module.time_decay.exp(), module.time_first

    def finish(z: Tensor) -> Tensor:
        out: Tensor = module.output.forward(gate * z.squeeze(-1).transpose(1, 2).to(gate.dtype))
        return out

    pattern = WKVPattern(rounded(k), rate, bonus, values=v[..., None])
    return Mixing(pattern, v[..., None], finish, "rwkv")
