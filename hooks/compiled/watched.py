"""The compiled parts of a model that is observed: their doors, and whose attention it is that their graphs record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

from torch import nn

from workbench.errors import CaptureError
from workbench.hooks import multihead
from workbench.hooks.calls import Owner
from workbench.hooks.compiled import graph
from workbench.hooks.compiled.backend import recording
from workbench.hooks.compiled.doors import Doors, Run, check_repeatable, recording_door
from workbench.hooks.compiled.operator import Receiver, Recorded, receiving
from workbench.hooks.compiled.regions import EAGER, Region, outside, stance
from workbench.hooks.finding import site_name

Begin = Callable[[nn.Module, Any, FrameType], None]


class Watched:
    """What of a model is compiled, while it is observed.

    Args:
        model: without the wrapper of `torch.compile`. run: what runs in the place of each compiled callable.

    Attributes:
        eager: the modules that run as Python, with their paths.

    Raises:
        CaptureError: some of it cannot be watched; the hint says what can be done.
    """

    def __init__(self, model: nn.Module, regions: Sequence[Region], run: Run) -> None:
        check_repeatable(regions, stance())
        self.eager = outside(model, list(regions))
        native = next((name for module, name in self.eager.items() if isinstance(module, multihead.MODULES)), None)
        if native is not None:
            raise CaptureError(
                "it is one of PyTorch's own attention modules, beside parts of the model that are compiled",
                site=native or None,
                hint=f"compile the whole model, or use {EAGER}",
            )
        self._doors = Doors(regions, lambda region: recording_door(region, run))
        self._modules = dict(model.named_modules())
        paths = {module: name for name, module in self._modules.items()}
        names = graph.Names.of(model)
        self._names = {
            region: replace(names, region=region.name if region.runs is None else paths[region.runs])
            for region in regions
        }
        self._recording = {region: recording(region) for region in regions}

    def open(self) -> None:
        """Put the doors in place."""
        self._doors.open()

    def close(self) -> None:
        """Take them away."""
        self._doors.close()

    def hooks(self, begin: Begin, finish: Callable[..., Any]) -> Iterator[tuple[MutableMapping[int, Any], Any]]:
        """Hooks on the modules that run as Python, each with the dict that it goes into, and flags beside them.

        Hooks of the process would be compiled with what is compiled.
        """
        before, after = _Hook(lambda module, args: begin(module, args, sys._getframe(2))), _Hook(finish)
        for module in self.eager:
            yield module._forward_hooks_with_kwargs, True
            yield module._forward_hooks_always_called, True
            yield module._forward_pre_hooks, before
            yield module._forward_hooks, after

    @contextmanager
    def graphs(self, region: Region, receiver: Receiver) -> Iterator[Callable[..., Any]]:
        """What runs as the region does; the receiver is told of its attention."""
        with ExitStack() as stack:
            stack.enter_context(receiving(receiver))
            stack.enter_context(graph.naming(self._names[region]))
            yield self._recording[region]

    def owner(self, region: Region, given: Recorded, fired: set[int]) -> tuple[Owner, Owner | None] | None:
        """Site and module that an attention belongs to, and path and module of what joins its heads; None if the graph
        is that of a function, which whoever runs has called.

        Args:
            fired: the places that have fired without a parameter that tells of the layer, in this run of the region.

        Raises:
            CaptureError: layers may share the graph, and nothing tells which of them runs.
        """
        place = graph.place(given.place)
        if place.site is None and region.runs is None:
            return None
        names = self._names[region]
        anchor = None if given.anchor is None else names.parameters.get(graph.lies_at(given.anchor))
        again = anchor is None and given.place in fired
        if place.site is None:
            path = None
        elif anchor is None:  # then only one of the region's layers may run this graph
            fired.add(given.place)
            path = graph.replaced_stem(place.site, place.region, names.region)
        else:
            path = place.moved(place.site, anchor)
        module = None if path is None else self._modules.get(path)
        if path is None or module is None or again:
            raise CaptureError(
                "which module runs a compiled graph with attention cannot be told: several layers may share it",
                site=place.site, hint=f"use {EAGER}",
            )  # fmt: skip
        joins = None if place.joins is None or anchor is None else place.moved(place.joins, anchor)
        joining = None if joins is None else self._modules.get(joins)
        return (site_name(path), module), None if joins is None or joining is None else (joins, joining)


class _Hook:
    """A hook of ours on a module. In a copy of the module, or a pickle, it does nothing."""

    def __init__(self, function: Callable[..., Any] = lambda *given: None) -> None:
        self._function = function

    def __call__(self, *given: Any) -> Any:
        return self._function(*given)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()
