"""Readers: how modules that mix tokens in their own way are read as attention; one file for each family."""

from workbench.hooks.readers import (
    agents,
    delta,
    fla,
    gates,
    halo,
    lightning,
    linear_attention,
    local,
    mamba,
    mamba2,
    rg_lru,
    routing,
    rwkv,
    short_conv,
<<<<<<< HEAD
    sparse_queries,
=======
    spikes,
>>>>>>> main
    xlstm,
)  # they register themselves
from workbench.hooks.readers.gates import gating
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
    "agents",
    "before_reading",
    "check_gradients",
    "continues",
    "delta",
    "fla",
    "gates",
    "gating",
    "halo",
    "in_place_of",
    "lightning",
    "linear_attention",
    "local",
    "mamba",
    "mamba2",
    "read_module",
    "reader",
    "reader_of",
    "rg_lru",
    "routing",
    "rwkv",
    "short_conv",
<<<<<<< HEAD
    "sparse_queries",
=======
    "spikes",
>>>>>>> main
    "xlstm",
]
