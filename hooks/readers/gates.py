"""Gates: how a product of what stands at a position and a factor is read; and gating units of other people's models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import has
from workbench.kernels.filters import DepthwisePattern
from workbench.kernels.gates import AdditivePattern, gate_map
from workbench.kernels.patterns import Pattern
from workbench.kernels.systems.mixing import mlp_mixer


def gating(
    u: Tensor,
    g: Tensor,
    *,
    channels: int = -1,
    finish: Callable[[Tensor], Tensor] = lambda y: y,
    source: Pattern | None = None,
    kernel: str = "gate",
) -> Mixing:
    """What a reader gives of a module that multiplies u by a factor g: the module's output is `finish(u · g)`.

    Sites of such readers are of kind "gate". Their heads are the channels, or all channels in one head where these have
    the same factor; see `workbench.kernels.gates.GatePattern`.

    Args:
        u: what is multiplied, [batch, ..., channel]. g: the factor, which broadcasts to u and has as many axes.
        channels: the axis of channels; 1 for images [batch, channel, row, column].
        finish: what the module does with the product, [as u].
        source: what each position adds to the factor, where that is known: a map of as many heads, kept as "source".
        kernel: a short name of the mechanism.

    Raises:
        CaptureError: shapes that do not fit.

    >>> x = torch.randn(2, 5, 3)
    >>> gating(x, x.mean(1, keepdim=True).sigmoid()).pattern.shape
    (2, 3, 5, 5)
    """
    pattern, values = gate_map(u, g, channels=channels)
    places, dtype = u.movedim(channels, 1).shape[2:], u.dtype

    def product(z: Tensor) -> Tensor:
        y = z.transpose(2, 3).flatten(1, 2)  # [batch, channel, position]
        return finish(y.unflatten(2, places).movedim(1, channels).to(dtype) if places else y.squeeze(2).to(dtype))

    return Mixing(pattern, values, product, kernel, others={} if source is None else {"source": source})


def depthwise(convolution: Any) -> tuple[Tensor, int] | None:
    """Kernel [channel, rows, columns] and dilation of a depth-wise convolution that keeps the grid; None of others."""
    edges, dilation = convolution.kernel_size, convolution.dilation
    same = tuple(d * (k // 2) for k, d in zip(edges, dilation, strict=True))
    plain = convolution.groups == convolution.in_channels == convolution.out_channels
    if not plain or convolution.stride != (1, 1) or convolution.padding != same or dilation[0] != dilation[1]:
        return None
    if convolution.padding_mode != "zeros" or not all(k % 2 for k in edges):
        return None
    return convolution.weight[:, 0], dilation[0]


def through_convolutions(u: Tensor, convolutions: list[Any], point: Tensor) -> AdditivePattern:
    """What each patch adds to a 1 × 1 convolution after depth-wise ones of images u [batch, channel, row, column].

    Args:
        convolutions: the depth-wise ones in turn. point: weight [channel, channel] of the last.

    Returns:
        The map, whose rows add up to the result without biases.
    """
    found = [one for each in convolutions if (one := depthwise(each)) is not None]
    weights, dilations = zip(*found, strict=True)
    base = DepthwisePattern(weights, dilations, (u.shape[2], u.shape[3]), len(u))
    return AdditivePattern(base, u.flatten(2)[..., None], point[..., None])


def through_token_mlp(z: Tensor, first: nn.Linear, second: nn.Linear) -> AdditivePattern:
    """What each token adds to an MLP over tokens whose GELU is held fixed: W₂ diag(Φ(h)) W₁ of each channel.

    Args:
        z: [batch, token, channel]. first, second: its layers, over the axis of tokens.

    Returns:
        The map, whose heads are the channels; rows add up to what the MLP gives, without what its biases add.
    """
    h = first.forward(z.transpose(1, 2))  # [batch, channel, hidden]
    slopes = 0.5 * (1 + torch.erf(h * 0.5**0.5))
    return AdditivePattern(mlp_mixer(first.weight, second.weight, slopes), z.transpose(1, 2)[..., None])


def _is_large_kernel(module: Any) -> bool:
    parts = has("conv0", "conv_spatial", "conv1")(module)
    return parts and all(isinstance(c, nn.Conv2d) and depthwise(c) for c in (module.conv0, module.conv_spatial))


@reader("LKA", kind="gate", when=_is_large_kernel, follows=("conv0", "conv_spatial"))
def large_kernel(run: ModuleRun) -> Mixing:
    """Large-kernel attention of Visual Attention Network."""
    module: Any = run.module
    u = run.inputs["x"]
    g = module.conv1.forward(module.conv_spatial.forward(module.conv0.forward(u)))
    source = through_convolutions(u, [module.conv0, module.conv_spatial], module.conv1.weight.flatten(1))
    return gating(u, g, channels=1, source=source, kernel="large_kernel")


def _is_mixer_gating(module: Any) -> bool:
    if not has("Mixer", "proj")(module) or not isinstance(getattr(module.Mixer, "token_mix", None), nn.Sequential):
        return False
    parts = [type(m) for m in module.Mixer.token_mix.modules() if not isinstance(m, nn.Sequential)]
    exact = all(m.approximate == "none" for m in module.Mixer.token_mix.modules() if isinstance(m, nn.GELU))
    return exact and parts.count(nn.Linear) == 2 and nn.GELU in parts and parts[:1] == [nn.LayerNorm]


@reader("MixerGatingUnit", kind="gate", when=_is_mixer_gating, follows=("Mixer",))
def mixer_gating(run: ModuleRun) -> Mixing:
    """The gating unit of NiNformer: an MLP-Mixer block makes the factor."""
    module: Any = run.module
    x = run.inputs["x"]
    first, second = (m for m in module.Mixer.token_mix.modules() if type(m) is nn.Linear)
    source = through_token_mlp(module.Mixer.token_mix[0].forward(x), first, second)
    return gating(module.proj.forward(x), module.Mixer.forward(x), source=source, kernel="ninformer")
