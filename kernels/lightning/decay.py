"""How fast each head forgets: decay rates per head, and their powers, of which none is ever above one."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from workbench.errors import CaptureError

Schedule = Literal["transnormer", "minimax"]
_SMALL = 1e-5  # keeps the last layer from never forgetting
_on_devices = WeakTensorKeyDictionary()  # of those numbers: their logarithms by device
_checked = WeakTensorKeyDictionary()  # of each tensor: its version when it was checked, and its numbers on the CPU


def slopes(n_heads: int) -> Tensor:
    """[head] float64 slopes of ALiBi (arXiv 2108.12409): 2^(−8(h+1)/H) for H a power of two.

    Any other H takes the slopes of the power of two below it, then every other one of the power of two above it.

    >>> slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    if n_heads < 1:
        raise CaptureError(f"there is no head to give a slope: n_heads is {n_heads}", hint="pass at least 1")
    whole = 1 << (n_heads.bit_length() - 1)

    def regular(n: int) -> list[float]:
        return [2 ** (-8 * (h + 1) / n) for h in range(n)]

    more = regular(2 * whole)[::2][: n_heads - whole]
    return torch.tensor(regular(whole) + more, dtype=torch.float64)


def decays(
    n_heads: int, layer: int | None = None, n_layers: int | None = None, schedule: Schedule = "transnormer"
) -> Tensor:
    """[head] float64 decays λ = exp(−slope), as the released models with lightning attention set them.

    Heads forget more slowly the deeper their layer lies: the last one hardly at all.

    Args:
        layer: position of the layer, from 0, among all of the model's, softmax layers included; None for the slopes
            alone, as the paper's kernels take them.
        n_layers: how many there are; needed with `layer`.
        schedule: "transnormer" multiplies `slopes` by 1 − layer / (n_layers − 1) + 10⁻⁵, as the released code of
            TransNormerLLM (arXiv 2307.14995) does. "minimax" is that of MiniMax (arXiv 2501.08313) in transformers:
            2^(−8(h+1)/H) for every H, times 1 − layer / (n_layers − 1 + 10⁻⁵) + 10⁻⁵.

    Raises:
        CaptureError: no such layer, or no such schedule.

    >>> [round(rate, 4) for rate in decays(2).tolist()]
    [0.9394, 0.9961]
    >>> [round(rate, 4) for rate in decays(2, layer=2, n_layers=4).tolist()]
    [0.9794, 0.9987]
    """
    if schedule not in ("transnormer", "minimax"):
        raise CaptureError(f'there is no schedule "{schedule}"', hint='take "transnormer" or "minimax"')
    if (layer is None) != (n_layers is None):
        raise CaptureError("a layer's decays follow from its place and the number of layers", hint="give both")
    found = slopes(n_heads) if schedule == "transnormer" else _plain_slopes(n_heads)
    if layer is None or n_layers is None:
        return torch.exp(-found)
    if not 0 <= layer < n_layers:
        raise CaptureError(f"there is no layer {layer} of {n_layers}", hint="the first layer is 0")
    last = n_layers - 1 if schedule == "transnormer" else n_layers - 1 + _SMALL
    return torch.exp(-found * (1 - (layer / last if layer else 0.0) + _SMALL))


def _plain_slopes(n_heads: int) -> Tensor:
    """[head] float64: 2^(−8(h+1)/H), also where H is no power of two."""
    slopes(n_heads)  # the check
    return 2.0 ** (-8 * torch.arange(1, n_heads + 1, dtype=torch.float64) / n_heads)


def check_decay(decay: Tensor | None, n_heads: int) -> Tensor:
    """[head] float64 on the CPU; the default decays for None.

    Raises:
        CaptureError: not one number per head, or one outside (0, 1].
    """
    if decay is None:
        return _default(n_heads)
    if not decay.is_floating_point():
        raise CaptureError(f"decay must be floating point, not {decay.dtype}", hint="pass λ itself, from 0 to 1")
    if decay.dim() != 1 or len(decay) != n_heads:
        raise CaptureError(
            f"decay must be [head], one number for each of {n_heads} heads",
            shape=decay.shape,
            hint="pass a tensor of that length, or None for decays(n_heads)",
        )
    version = None if decay.is_inference() else decay._version
    known = _checked.get(decay)
    if known is not None and version is not None and known[0] == version:
        return known[1]  # a layer's own decays come at each call, and a device would be waited for
    found = decay.detach().to("cpu", torch.float64, copy=True)
    for head, value in enumerate(found.tolist()):
        if not 0 < value <= 1:  # NaN too
            raise CaptureError(
                f"the decay of head {head} is {value}, outside (0, 1]",
                hint="pass λ itself, such as exp(-slope), neither the slope nor log λ",
            )
    if version is not None:
        _checked[decay] = version, found
    return found


def log_decays(decay: Tensor, device: torch.device, at_least: float = -torch.inf) -> Tensor:
    """[head] float64 ln λ of what `check_decay` gave, on a device: copied there once, since the host waits for it."""
    on = _on_devices.setdefault(decay, {})
    if (device, at_least) not in on:
        with torch.inference_mode(False):  # a tensor of that mode could not be used outside
            on[device, at_least] = decay.log().clamp(min=at_least).to(device)
    found: Tensor = on[device, at_least]
    return found


@lru_cache(maxsize=64)
def _default(n_heads: int) -> Tensor:
    return decays(n_heads)


def powers(decay: Tensor, exponents: Tensor, like: Tensor) -> Tensor:
    """λ^exponent, [head, *exponents.shape] with the dtype and device of `like`; exponents are at least zero.

    Powers too small for a normal number of that dtype are zero: a CPU takes far longer over subnormal ones.
    """
    exponents = exponents.to(decay)
    found = decay.view(-1, *[1] * exponents.dim()) ** exponents
    return torch.where(found < torch.finfo(like.dtype).tiny, 0.0, found).to(like)
