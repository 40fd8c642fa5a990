"""Doors: what stands in the place of a compiled callable while a model is observed, and nothing after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from types import CellType
from typing import Any

from workbench.errors import CaptureError
from workbench.hooks.compiled.regions import EAGER, Region

Run = Callable[[Region, tuple[Any, ...], Mapping[str, Any]], Any]
_NOTHING = object()
_MARK = "_workbench_door"


class Doors:
    """Puts something in the place of each compiled callable; both methods may be repeated.

    How to undo a change is noted before it is made: an interrupt at any point leaves nothing behind.

    Args:
        regions: what is compiled. door: makes what takes a callable's place.

    Raises:
        CaptureError: one of them cannot be replaced where it stands, or another workbench has replaced it.
    """

    def __init__(self, regions: Sequence[Region], door: Callable[[Region], Callable[..., Any]]) -> None:
        for region in regions:
            reason = "it is decorated, and stands inside another function" if region.holder is None else ""
            reason = "another Workbench watches it" if hasattr(region.compiled, _MARK) else reason
            if reason:
                raise CaptureError(
                    f"{region.what} is compiled, and cannot be watched: {reason}", site=region.name or None,
                    hint='run it under torch.compiler.set_stance("force_eager")',
                )  # fmt: skip
        self._made = [(region, door(region)) for region in regions]
        self._before: list[tuple[Region, Callable[..., Any], Any]] = []

    def open(self) -> None:
        """Put them in place."""
        for region, door in self._made if not self._before else ():
            self._before.append((region, door, _get(region)))
            _set(region, door)

    @property
    def are_open(self) -> bool:
        """Whether something stands in the place of a compiled callable."""
        return bool(self._before)

    def close(self) -> None:
        """What was there is there again."""
        for region, door, before in reversed(self._before):
            if _get(region) is door:
                _set(region, before)
        self._before.clear()


def recording_door(region: Region, run: Run) -> Callable[..., Any]:
    """What hands a call to `run`. Where Dynamo traces it, inside of what else is compiled, it sees through it."""

    @wraps(region.compiled)
    def door(*args: Any, **kwargs: Any) -> Any:
        return run(region, (*region.bound, *args), kwargs)

    setattr(door, _MARK, True)
    return door


def eager_door(region: Region) -> Callable[..., Any]:
    """What was compiled, uncompiled."""
    return partial(region.function, *region.bound) if region.bound else region.function


def check_repeatable(regions: Sequence[Region], stance: str) -> None:
    """Raise if what is compiled may not be compiled once more.

    Raises:
        CaptureError: the stance of this process forbids it.
    """
    if regions and stance in ("fail_on_recompile", "eager_on_recompile"):
        raise CaptureError(
            f'{regions[0].what} is compiled, and the stance "{stance}" forbids to compile it once more',
            site=regions[0].name or None,
            hint=f"capture before it is set, or use {EAGER}",
        )


def _get(region: Region) -> Any:
    holder = region.holder
    if isinstance(holder, CellType):
        return holder.cell_contents
    return _NOTHING if holder is None else holder.get(region.key, _NOTHING)


def _set(region: Region, value: Any) -> None:
    holder = region.holder
    if isinstance(holder, CellType):
        holder.cell_contents = value
    elif holder is not None and value is _NOTHING:
        holder.pop(region.key, None)
    elif holder is not None:
        holder[region.key] = value
