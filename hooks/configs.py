"""Reading a model's config, whatever it makes of the question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def read(owner: Any, name: str, default: Any = None) -> Any:
    """An attribute, or the default where there is none or its owner will not tell.

    Configs compute some of what they are asked for, and raise what they like: one of `transformers` with layers of
    several sizes refuses to name the size of them all.

    >>> read(nn.Linear(2, 3), "out_features"), read(None, "hidden_size")
    (3, None)
    """
    try:
        return getattr(owner, name, default)
    except Exception:
        return default


def config_of(module: nn.Module) -> Any:
    """The config of a module: that of its own layer, where the layers of a model differ."""
    config, layer = read(module, "config"), read(module, "layer_idx")
    several = read(config, "per_layer_config")
    if isinstance(several, Sequence) and isinstance(layer, int) and layer < len(several):
        return several[layer]
    return config
