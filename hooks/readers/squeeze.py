"""Reads squeeze-and-excitation: a factor for each channel of an image, made of what the channels are on average."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from workbench.hooks.readers.gates import gating
from workbench.hooks.readers.registered import Mixing, ModuleRun, reader

# Class -> the parts through which a channel's mean becomes its factor, in turn.
_PARTS = {
    "timm.layers.squeeze_excite.SEModule": ("fc1", "bn", "act", "fc2", "gate"),
    "timm.layers.squeeze_excite.SqueezeExciteCl": ("fc1", "act", "fc2", "gate"),
    "timm.layers.squeeze_excite.EffectiveSEModule": ("fc", "gate"),
    "timm.models._efficientnet_blocks.SqueezeExcite": ("conv_reduce", "act1", "conv_expand", "gate"),
    "torchvision.ops.misc.SqueezeExcitation": ("fc1", "activation", "fc2", "scale_activation"),
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetSqueezeExciteLayer": (
        "reduce", "act_reduce", "expand", "act_expand",
    ),
    "transformers.models.regnet.modeling_regnet.RegNetSELayer": ("attention",),
}  # fmt: skip


def _parts(module: nn.Module) -> tuple[str, ...] | None:
    """The parts of a module of one of these classes, or of a subclass; None of others."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
    return next((_PARTS[name] for name in names if name in _PARTS), None)


def _can_be_read(module: nn.Module) -> bool:
    found = _parts(module)
    return found is not None and all(hasattr(module, name) for name in found)


@reader(*_PARTS, kind="gate", when=_can_be_read)
def squeezed(run: ModuleRun) -> Mixing:
    """The product of an image and its channels' factors."""
    module: Any = run.module
    x: Tensor = next(iter(run.inputs.values()))
    last = isinstance(getattr(module, "fc1", None), nn.Linear)  # channels lie last
    places = (1, 2) if last else (2, 3)
    g = x.mean(places, keepdim=True)
    if getattr(module, "add_maxpool", False):
        g = 0.5 * g + 0.5 * x.amax(places, keepdim=True)
    for name in _parts(module) or ():
        g = getattr(module, name).forward(g)
    return gating(x, g, channels=-1 if last else 1, kernel="squeeze_excite")
