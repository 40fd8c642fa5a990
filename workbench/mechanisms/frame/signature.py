"""What one looks at first in a mechanism's heads, beside their map: a few small maps of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.patterns import Pattern
from workbench.mechanisms.frame.place import Place


@dataclass(frozen=True)
class Signature:
    """What is a mechanism's own, as small maps of each head; a room says in its file what that is.

    Attributes:
        title: a few words. about: what a map and a cell of it are, in a sentence or two.
        maps: of a layer's module and one of its patterns, for the first example: name -> [head, row, column], all of
            one shape, none negative, NaN where there is nothing; {} for a pattern of which there is nothing to say.
        rows, columns: what they are, where they are not the patches of a grid. value: what a cell holds.
    """

    title: str
    about: str
    maps: Callable[[nn.Module, Pattern], Mapping[str, Tensor]]
    rows: str = ""
    columns: str = "token"
    value: str = "weight"

    @torch.no_grad()
    def of(self, module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
        """The maps, checked, in float32.

        Raises:
            WorkbenchError: maps that are not [head, row, column], of several shapes, or negative somewhere.
        """
        found = {name: t.detach().float().cpu() for name, t in self.maps(module, pattern).items()}
        for name, t in found.items():
            if t.dim() != 3 or t.shape[0] != pattern.n_heads or t.shape != next(iter(found.values())).shape:
                raise WorkbenchError(
                    f'the map "{name}" of “{self.title}” is not [{pattern.n_heads} heads, row, column] as all others',
                    shape=t.shape,
                )
            if bool((t < 0).any()) or bool(t.isinf().any()):
                raise WorkbenchError(f'the map "{name}" of “{self.title}” has cells below zero, or without an end')
        return found


def at_places(place: Place, values: Tensor) -> Tensor:
    """Numbers [head, token] where the tokens stand: [head, 1, token], or of a grid [head, row, column]."""
    return values[:, None] if place.grid is None else values.unflatten(1, place.grid)


def by_blocks(weights: Tensor, block: int) -> Tensor:
    """[head, query block, key block]: what a query gives to a block of keys, a mean over the block of queries.

    NaN where no query of the block gives anything: what is hidden has no weight at all.

    >>> by_blocks(torch.eye(4)[None], 2)
    tensor([[[1., nan],
             [nan, 1.]]])
    """
    _, n_queries, n_keys = weights.shape
    down, across = -n_queries % block, -n_keys % block
    padded = torch.nn.functional.pad(weights, (0, across, 0, down)).unflatten(1, (-1, block)).unflatten(3, (-1, block))
    rows = torch.full((padded.shape[1],), float(block))
    rows[-1] -= down
    found = padded.sum((2, 4)) / rows.to(padded)[:, None]
    return found.masked_fill(~(padded != 0).any(4).any(2), torch.nan)
