"""Reads LFM2's gated short convolutions of Hugging Face transformers: a filter of a few positions for each channel.

The filter is the same for every input. Its values are gated before it, what it gives is gated after it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import cached, carried, check_run, has, unpadded
from workbench.kernels.recurrent import FilterPattern


@reader("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv", when=has("conv", "in_proj", "out_proj"), state=cached)
def short_conv(run: ModuleRun) -> Mixing:
    """The channels are the heads."""
    check_run(run)
    module: Any = run.module
    mask = run.inputs.get("attention_mask")
    hidden = unpadded(run.inputs["hidden_states"], mask)
    write, read, x = module.in_proj.forward(hidden).transpose(1, 2).chunk(3, dim=1)  # [batch, channel, position]
    weight, bias = module.conv.weight.squeeze(1), module.conv.bias

    def finish(z: Tensor) -> Tensor:
        y = z.squeeze(-1) if bias is None else z.squeeze(-1) + bias[:, None]
        out: Tensor = module.out_proj.forward((read * y.to(hidden.dtype)).transpose(1, 2))
        return out

    v = (write * x)[..., None]
    blank = module.in_proj.bias is None  # a bias is written at padding too, and read from there
    padding = mask == 0 if mask is not None and blank else None
    pattern = FilterPattern(weight, v.shape[0], v.shape[2], padding=padding, values=v)
    if (state := carried(run, "conv")) is not None and weight.shape[1] > 1:
        pattern.before = pattern.from_state(state[..., 1 - weight.shape[1] :])
    return Mixing(pattern, v, finish, "short_conv")
