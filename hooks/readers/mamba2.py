"""Reads Mamba-2 mixers of Hugging Face transformers as hidden attention, a map for each head.

As `mamba` does; what follows the scan is the skip D·x, the gated norm and the output projection.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

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
from workbench.kernels.state_space import DualPattern


@reader(
    "Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer",
    "Zamba2MambaMixer", when=has_parts, state=cached,
)  # fmt: skip
def mamba2(run: ModuleRun) -> Mixing:
    """C are the queries and B the keys of each group of heads."""
    check_run(run)
    return _dual(run, run.module, run.inputs["hidden_states"], run.inputs.get("attention_mask"))


def _dual(run: ModuleRun, module: Any, hidden: Tensor, mask: Tensor | None) -> Mixing:
    """Mamba-2: gate, x, B, C and Δ come from one projection; all but the gate and Δ are convolved."""
    scale = getattr(module, "ssm_in_multiplier", None)  # Falcon-H1 scales what goes in and what is projected
    hidden = unpadded(hidden, mask)
    projected = module.in_proj.forward(hidden if scale is None else hidden * scale)
    if scale is not None:
        projected = projected * module.mup_vector
    gate, x, steps = projected.split([module.intermediate_size, module.conv_dim, module.num_heads], dim=-1)
    x = unpadded(convolved(module, x.transpose(1, 2), carried(run, "conv")), mask)
    width = module.n_groups * module.ssm_state_size
    x, B, C = x.split([module.intermediate_size, width, width], dim=-1)
    delta = step_size(steps, module.dt_bias, (-1,))
    if run.carried is None or hidden.shape[1] > 1:  # at a single step the modules themselves leave the limits out
        delta = delta.clamp(*module.time_step_limit)
    x = x.unflatten(-1, (module.num_heads, -1))

    def finish(z: Tensor) -> Tensor:
        y = (z.transpose(1, 2) + x.float() * module.D[:, None]).flatten(2)
        y = module.norm.forward(y, gate) if getattr(module, "mamba_rms_norm", True) else y * F.silu(gate)
        out: Tensor = module.out_proj.forward(y.to(hidden.dtype))
        return out

    B, C = (rounded(t.unflatten(-1, (module.n_groups, -1)).transpose(1, 2)) for t in (B, C))
    v, delta = rounded(x.transpose(1, 2)), rounded(delta.transpose(1, 2))
    pattern = DualPattern(delta, -module.A_log.float().exp(), B, C, values=v)
    if (state := carried(run, "state")) is not None:
        pattern.before = pattern.from_state(state)
    return Mixing(pattern, v, finish, "mamba2", queries=C, keys=B)
