"""Readers: how modules that mix tokens in their own way are read as attention; one file for each family."""

from workbench.hooks.readers import mamba, mamba2  # they register themselves
from workbench.hooks.readers.registered import (
    Mixing,
    ModuleRun,
    Reader,
    continues,
    in_place_of,
    read_module,
    reader,
    reader_of,
)

__all__ = [
    "Mixing",
    "ModuleRun",
    "Reader",
    "continues",
    "in_place_of",
    "mamba",
    "mamba2",
    "read_module",
    "reader",
    "reader_of",
]
