"""The packages beside this file, each with a kernel and its pattern; imported when one of theirs is asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules


@cache
def import_own_packages() -> None:
    """Import every package of `workbench.kernels`, so that its families and functions are registered."""
    for module in iter_modules([str(Path(__file__).parent)], prefix=f"{__package__}."):
        if module.ispkg:
            import_module(module.name)
