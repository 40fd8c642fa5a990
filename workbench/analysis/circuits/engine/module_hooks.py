"""Functions on the residual stream, heads and projections as hooks of the modules that are given or give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.modules import Projection, times
from workbench.analysis.circuits.model.recording import first_float
from workbench.errors import WorkbenchError
from workbench.hooks.changes import Changes

Hook = Callable[[Tensor], Tensor | None]
"""What a function makes of a tensor; None: it stays as it is."""


def on_input(changes: Changes, module: nn.Module, functions: Sequence[Hook], first_only: bool = False) -> None:
    """Functions on the first tensor that a module is given."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        old = first_float((*args, *kwargs.values()))
        if old is None:
            raise WorkbenchError(f"{type(module).__name__} was given no tensor [batch, position, width]")
        new = _apply(functions, old)
        if first_only or new is old:
            return None
        swapped = {key: new if value is old else value for key, value in kwargs.items()}
        return tuple(new if value is old else value for value in args), swapped

    changes.before(module, hook, with_kwargs=True)


def on_output(changes: Changes, module: nn.Module, functions: Sequence[Hook]) -> None:
    """Functions on the first tensor that a module gives."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        old = first_float(output)
        if old is None:
            raise WorkbenchError(f"{type(module).__name__} gave no tensor [batch, position, width]")
        new = _apply(functions, old)
        if new is old:
            return None
        return new if isinstance(output, Tensor) else type(output)(new if value is old else value for value in output)

    changes.after(module, hook)


def on_sum(
    changes: Changes, block: nn.Module, writers: Sequence[tuple[nn.Module, float]], functions: Sequence[Hook]
) -> None:
    """Functions on the stream behind the last writer: what its block was given, and what they add to that.

    Each writer comes with the number that its output is multiplied by before it is added.

    Where they change it the writer gives what is missing, so that all that reads the stream later has it.
    """
    before: list[Tensor] = []
    on_input(changes, block, [lambda stream: before.append(stream.clone())], first_only=True)

    def on_earlier(factor: float) -> Hook:
        def add(written: Tensor) -> None:
            before[-1] = before[-1] + times(written, factor)

        return add

    *earlier, (last, by) = writers

    def on_written(written: Tensor) -> Tensor | None:
        stream = before.pop()
        total = stream + times(written, by)
        new = _apply(functions, total)
        return None if new is total else torch.where(new == total, written, times(new - stream, 1 / by))

    for writer, factor in earlier:
        on_output(changes, writer, [on_earlier(factor)])
    on_output(changes, last, [on_written])


def _apply(functions: Sequence[Hook], value: Tensor) -> Tensor:
    for function in functions:
        made = function(value)
        value = value if made is None else made
    return value


def on_heads(function: Hook, n_heads: int) -> Hook:
    """A function on heads [batch, position, head, width], as one on them joined."""

    def joined(value: Tensor) -> Tensor | None:
        made = function(value.unflatten(-1, (n_heads, -1)))
        return None if made is None else made.flatten(-2)

    return joined


def on_columns(function: Hook, part: Projection) -> Hook:
    """A function on queries, keys or values [batch, position, head, width], as one on all columns."""
    columns = part.columns

    def whole(value: Tensor) -> Tensor | None:
        made = function(value[..., columns])
        if made is None:
            return None
        return value.index_copy(-1, columns.flatten().to(value.device), made.flatten(-2).to(value.dtype))

    return whole
