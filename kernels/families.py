"""The pattern families by name, for files that keep a pattern's parts; a family is imported when it is first needed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor

from workbench.errors import FormatError, nearest

if TYPE_CHECKING:
    from workbench.kernels.patterns import Pattern

FAMILIES = {
    "DensePattern": "workbench.kernels.patterns",
    "SoftmaxPattern": "workbench.kernels.softmax",
    "S2Pattern": "workbench.kernels.s2",
    "NeighborhoodPattern": "workbench.kernels.neighborhood",
    "LightningPattern": "workbench.kernels.lightning",
    "ScanPattern": "workbench.kernels.scan",
    "SelectivePattern": "workbench.kernels.state_space",
    "DualPattern": "workbench.kernels.state_space",
}


def rebuild(family: str, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Pattern:
    """The pattern whose `parts()` these are.

    Raises:
        FormatError: there is no such family.
    """
    if family not in FAMILIES:
        raise FormatError(f'there is no pattern family "{family}"', hint=nearest(family, list(FAMILIES)))
    made: Pattern = getattr(import_module(FAMILIES[family]), family).rebuild(facts, tensors)
    return made
