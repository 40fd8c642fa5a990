"""Readers: how modules that mix tokens in their own way are read as attention; one file for each family."""

from workbench.hooks.readers import (
    delta,
    lightning,
    linear_attention,
    mamba,
    mamba2,
    rg_lru,
    rwkv,
    short_conv,
    xlstm,
)  # they register themselves
from workbench.hooks.readers.registered import (
    Begun,
    Mixing,
    ModuleRun,
    Reader,
    before_reading,
    check_gradients,
    continues,
    in_place_of,
    read_module,
    reader,
    reader_of,
)

__all__ = [
    "Begun",
    "Mixing",
    "ModuleRun",
    "Reader",
    "before_reading",
    "check_gradients",
    "continues",
    "delta",
    "in_place_of",
    "lightning",
    "linear_attention",
    "mamba",
    "mamba2",
    "read_module",
    "reader",
    "reader_of",
    "rg_lru",
    "rwkv",
    "short_conv",
    "xlstm",
]
