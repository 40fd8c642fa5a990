"""What the readers of state-space mixers share: their checks, and the steps that they take again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks.readers.registered import ModuleRun
from workbench.hooks.tap import Unshown

_CACHES = ("cache_params", "past_key_values", "state")
_PACKED = ("seq_idx", "cu_seq_lens_q", "cu_seqlens")


def has(*parts: str) -> Callable[[nn.Module], bool]:
    """Whether a module has what the mixers of transformers have, rather than only the name of one."""
    return lambda module: all(hasattr(module, name) for name in parts)


has_parts = has("in_proj", "conv1d", "A_log", "D")


def check_run(run: ModuleRun) -> None:
    """Refuse a run whose map is not that of one whole sequence per batch entry.

    Raises:
        Unshown: the mixer went on from a state that is not known, or runs on packed sequences.
        CaptureError: it is not known whether it went on from one.
    """
    if run.continued is None and any(run.inputs.get(name) is not None for name in _CACHES):
        raise CaptureError(
            "whether the mixer's cache was empty cannot be told after it has run",
            site=run.site,
            hint="ask `continues` before the module runs, and pass what it says",
        )
    if run.continued and run.carried is None:
        raise Unshown(
            "the mixer goes on from a cached state: positions before this call act on it, and no map of the call shows "
            "them",
            site=run.site,
            hint="capture one forward over the whole sequence, with use_cache=False or an empty cache, or attention "
            'sites only: capture(sites=lambda site: site.kind != "state")',
        )
    packed = next((name for name in _PACKED if run.inputs.get(name) is not None), None)
    if packed is not None:
        raise Unshown(
            f"the mixer runs on packed sequences ({packed}), whose map ends where a sequence does",
            site=run.site,
            hint="capture one sequence per batch row",
        )


def cached(module: Any, inputs: Mapping[str, Any], output: Any) -> dict[str, Tensor] | None:
    """What a cache of transformers holds of a mixer: "conv" [batch, channel, size] and "state", as far as it does."""
    cache = next((inputs[name] for name in _CACHES if inputs.get(name) is not None), None)
    if cache is None or not hasattr(cache, "get_conv_state"):
        return None
    found = {
        "conv": cache.get_conv_state(module.layer_idx),
        "state": cache.get_recurrent_state(module.layer_idx),
    }
    return {name: t for name, t in found.items() if t is not None}


def carried(run: ModuleRun, name: str) -> Tensor | None:
    """A part of the state that the mixer went on from; None if it begins."""
    return None if run.carried is None else run.carried[name]


def unpadded(t: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, position, width] with zeros where the mask [batch, position] says that there is padding."""
    return t if mask is None else (t * mask[:, :, None]).to(t.dtype)


def convolved(module: Any, x: Tensor, before: Tensor | None = None) -> Tensor:
    """The module's causal convolution over positions and its activation: [batch, channel, n] -> [batch, n, channel]."""
    out = filtered(module.conv1d, x, before)
    act = module.act if hasattr(module, "act") else _activation(module, module.activation)
    found: Tensor = act.forward(out).to(x.dtype)
    return found.transpose(1, 2)


def filtered(conv: Any, x: Tensor, before: Tensor | None = None) -> Tensor:
    """A causal convolution for each channel of x [batch, channel, position], in the dtype of its weights.

    Args:
        before: the positions before the first, [batch, channel, at least size − 1]; zeros if None.
    """
    weight, n = conv.weight, x.shape[-1]
    if before is not None and weight.shape[-1] > 1:
        longer = torch.cat((before[..., 1 - weight.shape[-1] :], x), dim=-1).to(weight.dtype)
        return F.conv1d(longer, weight, conv.bias, groups=x.shape[1])
    return F.conv1d(x.to(weight.dtype), weight, conv.bias, padding=weight.shape[-1] - 1, groups=x.shape[1])[..., :n]


def _activation(module: nn.Module, name: str) -> Any:
    """The activation that the module's own release has under that name."""
    for base in type(module).__mro__:
        table = getattr(sys.modules.get(base.__module__), "ACT2FN", None)
        if table is not None:
            return table[name]
    raise AttributeError(f'nothing says what its activation "{name}" is')


def step_size(steps: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Δ: softplus of what is projected, plus a bias of that shape."""
    return F.softplus(steps if bias is None else steps + bias.float().to(steps.dtype).view(shape))


def rounded(t: Tensor) -> Tensor:
    """In float32 where it was float64: what these modules' scans do with it."""
    return t.float() if t.dtype == torch.float64 else t
