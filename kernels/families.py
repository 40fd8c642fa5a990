"""Pattern families by name, for files that keep a pattern's state: a subclass of `Pattern` is one by being defined.

A file says no module to import. Families of packages that are not imported yet are found through the entry points of
the group "workbench.patterns", in which any installed package can name the module that defines one:

    [project.entry-points."workbench.patterns"]
    MyPattern = "my_package.patterns"
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from workbench.errors import FormatError, WorkbenchError, nearest
from workbench.kernels.own_packages import import_own_packages
from workbench.kernels.patterns import Pattern
from workbench.kernels.patterns.base import FAMILIES

GROUP = "workbench.patterns"


def family(name: str) -> type[Pattern]:
    """The class of a family.

    Raises:
        FormatError: there is no such family, or several modules define one.
    """
    if name not in FAMILIES:
        import_own_packages()
    if name not in FAMILIES:
        for point in entry_points(group=GROUP, name=name):
            import_module(point.module)
    found = FAMILIES.get(name, {})
    if not found:
        raise FormatError(
            f'there is no pattern family "{name}"',
            hint=nearest(name, list(FAMILIES)) or "import the module that defines it, then load again",
        )
    if len(found) > 1:
        where = " and ".join(sorted(f"{module}.{qualified}" for module, qualified in found))
        raise FormatError(f'several pattern families are called "{name}": {where}', hint="rename one of them")
    return next(iter(found.values()))


def rebuild(name: str, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Pattern:
    """The pattern whose `state()` these are.

    Raises:
        FormatError: there is no such family, or these do not make one.
    """
    made = family(name)
    try:
        return made.rebuild(facts, tensors)
    except FormatError:
        raise
    except WorkbenchError as error:
        raise FormatError(f"a {name} in the file does not fit: {error.message}", shape=error.shape) from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"the file does not hold a {name}: {type(error).__name__}: {error}") from error
