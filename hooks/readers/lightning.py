"""Reads MiniMax's lightning attention of Hugging Face transformers, with the slopes of its own layer.

What follows the map is a norm over all heads, the gate and the output projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from workbench.hooks.readers.registered import Mixing, ModuleRun, join_heads, reader
from workbench.hooks.readers.state_space import carried, check_run, has, unpadded
from workbench.kernels.lightning import LightningPattern


def _held(module: nn.Module, inputs: Mapping[str, Any], output: Any) -> dict[str, Tensor] | None:
    """Its cache has a list of states of its own, filled as far as a layer has run."""
    cache: Any = inputs.get("past_key_values")
    held = None if cache is None else cache.get_linear_cache(module.layer_idx)
    return None if held is None or len(held) == 0 else {"state": held}


def _continues(module: nn.Module, inputs: Mapping[str, Any]) -> bool:
    return _held(module, inputs, None) is not None


@reader(
    "MiniMaxLightningAttention", when=has("qkv_proj", "slope_rate", "output_gate"), continues=_continues, state=_held,
)  # fmt: skip
def lightning(run: ModuleRun) -> Mixing:
    """Queries, keys and values pass an activation each; a head's decay is constant."""
    check_run(run)
    module: Any = run.module
    hidden = run.inputs["hidden_states"]
    qkv = unpadded(module.act_fn.forward(module.qkv_proj.forward(hidden)), run.inputs.get("attention_mask"))
    split = qkv.unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
    q, k, v = split.split(module.head_dim, dim=-1)
    decay = module.slope_rate.double().flatten().neg().exp()

    def finish(z: Tensor) -> Tensor:
        y = module.norm.forward(join_heads(z).to(hidden.dtype))
        out: Tensor = module.out_proj.forward(module.output_gate.forward(hidden).sigmoid() * y)
        return out

    pattern = LightningPattern(q, k, decay, values=v)
    if (state := carried(run, "state")) is not None:
        pattern.before = pattern.from_state(state)
    return Mixing(pattern, v, finish, "lightning", queries=q, keys=k)
