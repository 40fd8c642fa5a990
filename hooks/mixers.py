"""The tap on state-space mixers: Mamba and Mamba-2 modules of Hugging Face transformers, read as hidden attention.

A mixer gives only its output, so its steps are taken again from its inputs and its own parameters, up to the scan: the
values x, the steps Δ, and A, B and C of the map that the scan applies to x. What follows the scan (the skip D·x, gate,
norm and output projection) is kept as `finish`; that `finish(A·V)` is what the module gave proves the reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks.tap import AttentionCall
from workbench.kernels.state_space import DualPattern, SelectivePattern


@dataclass(frozen=True)
class _Scan:
    """What goes into a scan, and what the module makes of what comes out.

    Attributes:
        v: [batch, head, position, width]. delta: [batch, head, position]. A: [head, state] or [head].
        B, C: [batch, group, position, state].
        finish: maps A·V [batch, head, position, width] to the module's output.
    """

    v: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    finish: Callable[[Tensor], Tensor]


def is_mixer(module: nn.Module) -> bool:
    """Whether the module is a Mamba or Mamba-2 mixer that `mixer_call` can read, by the names of its classes.

    >>> is_mixer(nn.Linear(2, 2))
    False
    """
    return _kind(module) is not None and all(hasattr(module, name) for name in ("in_proj", "conv1d", "A_log", "D"))


def resumes(module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a mixer that is about to run goes on from the cached state of earlier positions.

    To be asked before it runs: after that its cache holds a state in any case.
    """
    cache = _given(inputs, kwargs).get("cache_params")
    if cache is None:
        return False
    known = getattr(cache, "has_previous_state", True)  # a cache that does not tell may hold one
    return bool(known(module.layer_idx) if callable(known) else known)


def mixer_call(
    site: str,
    module: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
    *,
    resumed: bool | None = None,
) -> AttentionCall:
    """The call of a mixer that has run, read from its inputs and its parameters.

    Args:
        site: the module's name.
        inputs, kwargs: what the module was called with. output: what it gave.
        resumed: what `resumes` said before it ran; needed only where it was given a cache.

    Returns:
        A call whose heads are the channels (Mamba) or heads (Mamba-2), with C as q and B as k, [batch, group, position,
        state], and what the map is applied to as v, [batch, head, position, width].

    Raises:
        CaptureError: the mixer went on from a cached state, or it is not known whether; packed sequences; a module that
            lacks what the mixers of its name have.
    """
    kind, given = _kind(module), _given(inputs, kwargs)
    if kind is None:
        raise CaptureError(f"{type(module).__name__} is no state-space mixer that is known", site=site)
    if resumed is None and given.get("cache_params") is not None:
        raise CaptureError(
            "whether the mixer's cache was empty cannot be told after it has run",
            site=site,
            hint="ask `resumes` before the module runs, and pass what it says",
        )
    if resumed:
        raise CaptureError(
            "the mixer goes on from a cached state: positions before this call act on it, and no map of the call shows "
            "them",
            site=site,
            hint="capture one forward over the whole sequence, with use_cache=False or an empty cache, or attention "
            'sites only: capture(sites=lambda site: site.kind != "state")',
        )
    if given.get("seq_idx") is not None:
        raise CaptureError(
            "the mixer runs on packed sequences (seq_idx), whose map ends where a sequence does",
            site=site,
            hint="capture one sequence per batch row",
        )
    hidden: Tensor = given["hidden_states"]
    name, read, family = kind
    try:
        scan = read(module, hidden, given.get("attention_mask"))
    except AttributeError as error:
        raise CaptureError(
            f"this {type(module).__name__} is not built as those of transformers 5: {error}",
            site=site,
            hint="is it another class of the same name, or another release?",
        ) from error
    return AttentionCall(
        site=site,
        module=module,
        q=scan.C,
        k=scan.B,
        v=scan.v,
        output=output[0] if isinstance(output, tuple) else output,
        kernel=name,
        tap="mixer",
        is_causal=True,
        finish=scan.finish,
        build=lambda: family(scan.delta, scan.A, scan.B, scan.C, values=scan.v),
    )


def _given(inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs by name; all mixers name and order them alike."""
    return dict(zip(("hidden_states", "cache_params", "attention_mask"), inputs, strict=False)) | dict(kwargs)


def _selective(module: Any, hidden: Tensor, mask: Tensor | None) -> _Scan:
    """Mamba: Δ, B and C of every channel come from the convolved x; some releases norm them first."""
    projected = module.in_proj.forward(_unpadded(hidden, mask)).transpose(1, 2)
    x, gate = projected.chunk(2, dim=1)
    x = _unpadded(_convolved(module, x), mask)
    low, B, C = module.x_proj.forward(x).split(
        [module.time_step_rank, module.ssm_state_size, module.ssm_state_size], dim=-1
    )
    if hasattr(module, "dt_layernorm"):
        low, B, C = (
            norm.forward(t)
            for norm, t in ((module.dt_layernorm, low), (module.b_layernorm, B), (module.c_layernorm, C))
        )
    if hasattr(getattr(module, "config", None), "_is_quantized"):  # then the weight is no plain matrix
        steps = (module.dt_proj.forward(low) - module.dt_proj.bias).transpose(1, 2)
    else:
        steps = module.dt_proj.weight @ low.transpose(1, 2)
    delta = _step_size(steps, module.dt_proj.bias, (-1, 1))
    return _of_channels(module, x.transpose(1, 2), gate, delta, module.A_log, module.D, B[:, None], C[:, None], hidden)


def _many_headed(module: Any, hidden: Tensor, mask: Tensor | None) -> _Scan:
    """Zamba's Mamba: groups of channels, each with projections of its own to Δ, B and C."""
    b, n, _ = hidden.shape
    projected = module.in_proj.forward(_unpadded(hidden, mask)).transpose(1, 2)
    x, gate = projected.reshape(b, -1, 2, n).unbind(2)
    x = _unpadded(_convolved(module, x), mask).transpose(1, 2)
    grouped = x.reshape(b, module.n_mamba_heads, module.mamba_head_dim, n)
    low, B, C = (module.x_proj_weight @ grouped).transpose(-1, -2).split(
        [module.time_step_rank, module.ssm_state_size, module.ssm_state_size], dim=-1
    )  # fmt: skip
    steps = (module.dt_proj_weight @ low.transpose(-1, -2)).flatten(1, 2)
    bias = None if module.dt_proj_bias is None else module.dt_proj_bias.flatten()
    delta = _step_size(steps, bias, (-1, 1))
    return _of_channels(module, x, gate, delta, module.A_log.flatten(0, 1), module.D.flatten(), B, C, hidden)


def _of_channels(
    module: Any,
    x: Tensor,
    gate: Tensor,
    delta: Tensor,
    A_log: Tensor,
    D: Tensor,
    B: Tensor,
    C: Tensor,
    hidden: Tensor,
) -> _Scan:
    """The scan of a Mamba whose x, gate and delta are [batch, channel, position]."""

    def finish(z: Tensor) -> Tensor:
        y = (z.squeeze(-1) + x * D.float()[:, None]) * F.silu(gate)
        out: Tensor = module.out_proj.forward(y.transpose(1, 2).to(hidden.dtype))
        return out

    return _Scan(_rounded(x)[..., None], delta, -A_log.float().exp(), _rounded(B), C, finish)


def _dual(module: Any, hidden: Tensor, mask: Tensor | None) -> _Scan:
    """Mamba-2: gate, x, B, C and Δ come from one projection; all but the gate and Δ are convolved."""
    scale = getattr(module, "ssm_in_multiplier", None)  # Falcon-H1 scales what goes in and what is projected
    hidden = _unpadded(hidden, mask)
    projected = module.in_proj.forward(hidden if scale is None else hidden * scale)
    if scale is not None:
        projected = projected * module.mup_vector
    gate, x, steps = projected.split([module.intermediate_size, module.conv_dim, module.num_heads], dim=-1)
    x = _unpadded(_convolved(module, x.transpose(1, 2)), mask)
    width = module.n_groups * module.ssm_state_size
    x, B, C = x.split([module.intermediate_size, width, width], dim=-1)
    delta = _step_size(steps, module.dt_bias, (-1,)).clamp(*module.time_step_limit)
    x = x.unflatten(-1, (module.num_heads, -1))

    def finish(z: Tensor) -> Tensor:
        y = (z.transpose(1, 2) + x.float() * module.D[:, None]).flatten(2)
        y = module.norm.forward(y, gate) if getattr(module, "mamba_rms_norm", True) else y * F.silu(gate)
        out: Tensor = module.out_proj.forward(y.to(hidden.dtype))
        return out

    B, C = (_rounded(t.unflatten(-1, (module.n_groups, -1)).transpose(1, 2)) for t in (B, C))
    v, delta = _rounded(x.transpose(1, 2)), _rounded(delta.transpose(1, 2))
    return _Scan(v, delta, -module.A_log.float().exp(), B, C, finish)


def _unpadded(t: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, position, width] with zeros where the mask [batch, position] says that there is padding."""
    return t if mask is None else (t * mask[:, :, None]).to(t.dtype)


def _convolved(module: Any, x: Tensor) -> Tensor:
    """The module's causal convolution over positions and its activation: [batch, channel, n] -> [batch, n, channel]."""
    conv = module.conv1d
    out = F.conv1d(
        x.to(conv.weight.dtype), conv.weight, conv.bias, padding=conv.weight.shape[-1] - 1, groups=x.shape[1]
    )
    found: Tensor = module.act.forward(out[..., : x.shape[-1]]).to(x.dtype)
    return found.transpose(1, 2)


def _step_size(steps: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    return F.softplus(steps if bias is None else steps + bias.float().to(steps.dtype).view(shape))


def _rounded(t: Tensor) -> Tensor:
    """In float32 where it was float64: what these modules' scans do with it."""
    return t.float() if t.dtype == torch.float64 else t


_Reader = Callable[[Any, Tensor, Tensor | None], _Scan]
_Kind = tuple[str, _Reader, type[SelectivePattern] | type[DualPattern]]
_MAMBA: _Kind = ("mamba", _selective, SelectivePattern)
_MAMBA2: _Kind = ("mamba2", _dual, DualPattern)
_KINDS: dict[str, _Kind] = {
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "JambaMambaMixer": _MAMBA,
    "ZambaMambaMixer": ("mamba", _many_headed, SelectivePattern),
    "Mamba2Mixer": _MAMBA2,
    "BambaMixer": _MAMBA2,
    "FalconH1Mixer": _MAMBA2,
    "GraniteMoeHybridMambaLayer": _MAMBA2,
    "NemotronHMamba2Mixer": _MAMBA2,
    "Zamba2MambaMixer": _MAMBA2,
}
"""By the name of the class in transformers; subclasses are found by their bases."""


def _kind(module: nn.Module) -> _Kind | None:
    return next((_KINDS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _KINDS), None)
