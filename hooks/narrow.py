"""Where only a few sites are watched: a hook on each of them, and on what they are all parts of, in place of those of
the process.

It is enough where their calls come through Hugging Face's registry, which says itself who calls and what the axes are.
No mode is on then, so that all other modules and functions cost what they always do.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from workbench.hooks.finding import site_name
from workbench.hooks.forwards import InputsHook
from workbench.hooks.kernel_watch import LseWatch
from workbench.hooks.multihead import MODULES

UNWATCHED = LseWatch()
"""Of kernels that nobody looks at."""
AGAIN = "run it again: it is watched more widely from now on"
Hook = tuple[MutableMapping[int, Any], int, Any]
"""Where a hook goes, its key, and the hook."""


class BeginHook(InputsHook):
    """A module begins; told is the frame in which its forward is called, too."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # type: ignore[override]
        for tell in self._tell:
            tell(module, args, sys._getframe(1))


class EndHook(InputsHook):
    """A module has ended, with an output or, after an exception, with None."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for tell in self._tell:
            tell(module, output)


class Narrow:
    """A few sites of a model.

    Args:
        names: the model's modules. sites: those that are watched.

    Attributes:
        sites: by module. around: what all of them are parts of, the model first.
    """

    def __init__(self, names: Mapping[nn.Module, str], sites: Collection[str]) -> None:
        found = {module: site_name(name) for module, name in names.items()}
        self.sites = {module: site for module, site in found.items() if site in sites}
        paths = [names[module] for module in self.sites]
        self.around = [m for m, name in names.items() if not name or all(path.startswith(f"{name}.") for path in paths)]
        self._all_found = len(self.sites) == len(set(sites))

    @property
    def is_enough(self) -> bool:
        """Whether all sites were found, and no module is one that changes its path when it carries hooks."""
        return self._all_found and not any(isinstance(one, MODULES) for one in (*self.around, *self.sites))

    def hooks(self, begin: Callable[..., None], end: Callable[..., None], runs: Callable[..., None]) -> Iterator[Hook]:
        """Those that tell of what is around the sites as it begins and ends, and of each site as it is about to run."""
        key = RemovableHandle(OrderedDict()).id
        for module in self.around:
            yield module._forward_hooks_always_called, key, True
            yield module._forward_pre_hooks, key, BeginHook([begin])
            yield module._forward_hooks, key, EndHook([end])
        for module in self.sites:
            if module not in self.around:
                yield module._forward_pre_hooks, key, BeginHook([runs])
