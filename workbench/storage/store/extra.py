"""The packages that only stores need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from workbench.errors import WorkbenchError

_HINT = "pip install 'attention-workbench[store]'"


def need(module: str, what: str) -> Any:
    """A module of the extra `store`.

    Args:
        what: what it is needed for, for the error.

    Raises:
        WorkbenchError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        raise WorkbenchError(f"{what} needs the package {module.partition('.')[0]}", hint=_HINT) from None
