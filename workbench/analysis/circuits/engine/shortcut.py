"""Modules that run only where what they read has changed: a patch changes few positions.

In a causal model nothing before the first patched token changes, and often only the last token does. MLPs and
projections, which are most of a forward, work on each position alone, so everywhere else they give what they gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.hooks.changes import Changes

_MOST = 0.8  # share of changed positions above which the whole MLP is faster
_ROUNDING = 8.0  # units in the last place: batches of other sizes are added up in another order


def only_where_changed(
    changes: Changes, modules: Sequence[nn.Module], given: Tensor, gave: Tensor | None = None
) -> None:
    """From here on, modules in a row skip the positions at which the first one is given what it was given before.

    Args:
        changes: ends it.
        modules: each works on each position alone, and is given what the one before it gave.
        given: [batch, position, width] what the first one was given before. The forward to come may be of several
            repeats of that batch, side by side.
        gave: what the last one gave then; if it is not known, it is computed again.
    """
    skip = _Skip(given, gave, [module.forward for module in modules])
    for number, module in enumerate(modules):
        first, last = number == 0, number == len(modules) - 1
        changes.forward(module, skip.around(module.forward, first, last))


class _Skip:
    """The changed positions of the forward that is running."""

    def __init__(self, given: Tensor, gave: Tensor | None, forwards: Sequence[Callable[..., Any]]) -> None:
        self.given, self.gave, self.forwards = given, gave, forwards
        self.changed: Tensor | None = None  # [repeat · batch, position]; None: all of them

    def around(self, forward: Callable[..., Any], first: bool, last: bool) -> Callable[..., Any]:
        """The forward of a module on the changed positions, [1, changed, width], between the first and last module."""

        def shorter(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if first:
                self.changed = self._changed(x)
                x = x if self.changed is None else x[self.changed][None]
            output = forward(x, *args, **kwargs)
            if not last or self.changed is None:
                return output
            gave = self._given_back() if self.gave is None else self.gave
            whole = gave.repeat(self.changed.shape[0] // gave.shape[0], 1, 1)
            whole[self.changed] = _first(output)[0]
            return whole if isinstance(output, Tensor) else (whole, *output[1:])

        return shorter

    def _given_back(self) -> Tensor:
        gave = self.given
        for forward in self.forwards:
            gave = _first(forward(gave))
        return gave

    def _changed(self, x: Tensor) -> Tensor | None:
        if x.dim() != 3 or x.shape[1:] != self.given.shape[1:] or x.shape[0] % self.given.shape[0]:
            return None
        apart = x.unflatten(0, (-1, self.given.shape[0]))
        bound = _ROUNDING * torch.finfo(x.dtype).eps * self.given.abs().amax(-1)
        changed = ((apart - self.given).abs().amax(-1) > bound).flatten(0, 1)
        return None if float(changed.double().mean()) > _MOST else changed


def _first(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first
