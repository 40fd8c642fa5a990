"""Hooks on modules, and forwards in place of their own, for as long as they are wanted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_NOTHING = object()


class Changes:
    """Changes of modules that end with the block in which they are made.

    How to undo a change is noted before it is made, and undoing may be repeated: an interrupt at any point leaves
    nothing behind. One that comes just as `__exit__` begins is made good when the object goes.

    >>> layer = nn.Linear(2, 2)
    >>> with Changes() as changes:
    ...     changes.after(layer, lambda module, args, output: -output)
    ...     len(layer._forward_hooks)
    1
    >>> len(layer._forward_hooks)
    0
    """

    def __init__(self) -> None:
        self._before: list[tuple[MutableMapping[Any, Any], Any, Any]] = []  # a dict, a key of it, what was there

    def __enter__(self) -> Changes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._undo()
        finally:
            self._undo()  # again, for the interrupt that broke off the first

    def __del__(self) -> None:
        if hasattr(self, "_before"):  # no interrupt came before there was anything to undo
            self._undo()

    def before(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        """A forward pre-hook, as `register_forward_pre_hook` takes it."""
        key = RemovableHandle(OrderedDict()).id
        if with_kwargs:
            self._put(module._forward_pre_hooks_with_kwargs, key, True)
        self._put(module._forward_pre_hooks, key, hook)

    def after(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        """A forward hook, as `register_forward_hook` takes it."""
        key = RemovableHandle(OrderedDict()).id
        if with_kwargs:
            self._put(module._forward_hooks_with_kwargs, key, True)
        self._put(module._forward_hooks, key, hook)

    def forward(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """A function in place of the module's forward.

        Not by `setattr`: a TransformerLens bridge hands that on to the module that it wraps.
        """
        self._put(module.__dict__, "forward", function)

    def _put(self, where: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        self._before.append((where, key, where.get(key, _NOTHING)))
        where[key] = value

    def _undo(self) -> None:
        for where, key, before in reversed(self._before):
            if before is _NOTHING:
                where.pop(key, None)
            else:
                where[key] = before
