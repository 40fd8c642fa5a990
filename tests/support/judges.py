"""Packages of other people's models and weights, in a folder of their own (`tests/judges.txt`)."""

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from support.unavailable import unavailable

FOLDER = Path(__file__).parents[2] / ".cache" / "judges"
TAKEN = ("fla",)  # `transformers` runs its Triton kernels for models' own, without a GPU too, wherever it can import it
_put_aside: dict[str, ModuleType] = {}


@contextmanager
def judges() -> Iterator[None]:
    """They can be imported inside; some of them go on importing as they are used."""
    sys.path.append(str(FOLDER))
    sys.modules.update(_put_aside)
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        for name in [name for name in sys.modules if name.partition(".")[0] in TAKEN]:
            _put_aside[name] = sys.modules.pop(name)


def part(module: str) -> ModuleType:
    """A module of a package whose own `__init__` is not run: it needs, or changes, what tests must not.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    package = module.partition(".")[0]
    folder = FOLDER / package
    if not folder.is_dir():
        raise ModuleNotFoundError(f"No module named {package!r}")
    bare = ModuleType(package)
    bare.__path__ = [str(folder)]
    sys.modules.setdefault(package, bare)
    with judges():
        return import_module(module)


def naive_of_fla(kernel: str, name: str) -> Any:
    """A function of one of fla's naive files: the package itself, once imported, changes what others do."""
    path = FOLDER / "fla" / "ops" / kernel / "naive.py"
    if not path.exists():
        missing(ModuleNotFoundError(f"no {path.name} of fla's {kernel}"))
    return runpy.run_path(str(path))[name]


def missing(error: Exception) -> NoReturn:
    """Skip the test, since one of them is not installed; with CI=true fail it."""
    unavailable(f"{error}: make .cache/judges/.ready")
