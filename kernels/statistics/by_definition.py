"""A statistic from its definition alone: whole rows, put together from their tiles, a strip of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.statistics.accumulator import Accumulator
from workbench.kernels.statistics.options import Options
from workbench.kernels.statistics.whole_rows import WholeRows
from workbench.kernels.tile import Rows, Space, Tile

Definition = Callable[[WholeRows], Tensor | dict[str, Tensor]]


def defined(name: str, outputs: Sequence[str], define: Definition, rows: WholeRows) -> dict[str, Tensor]:
    """What a definition gives, by output name.

    Raises:
        CaptureError: it gives something else than its outputs.
    """
    found = define(rows)
    by_name = found if isinstance(found, dict) else {name: found}
    if set(by_name) != set(outputs) or not all(isinstance(value, Tensor) for value in by_name.values()):
        gave = ", ".join(map(str, by_name)) if isinstance(found, dict) else type(found).__name__
        raise CaptureError(f'the definition of "{name}" gives {gave}', hint=f"return {', '.join(outputs)} as tensors")
    return {out: by_name[out] for out in outputs}


class ByDefinition(Accumulator):
    """Applies a definition to strips of whole rows: O(keys) numbers for each row of a strip."""

    def __init__(self, space: Space, options: Options, name: str, outputs: Sequence[str], define: Definition) -> None:
        super().__init__(space, options)
        self.name, self.outputs, self.define = name, outputs, define
        self._strip: Tensor | None = None
        self._found: dict[str, Tensor] = {}

    def add(self, tile: Tile) -> None:
        if self._strip is None:
            self._strip = tile.p.new_zeros(*tile.p.shape[:3], self.space.n_keys)
        self._strip[..., tile.keys] = tile.p

    def end_rows(self, rows: Rows) -> None:
        """The definition, on these rows."""
        batch, heads, queries = rows
        sizes = (len(range(n)[part]) for n, part in zip(self.space.shape, rows, strict=False))
        shape = (*sizes, self.space.n_keys)
        p = torch.zeros(shape, dtype=self.space.dtype, device=self.space.device) if self._strip is None else self._strip
        self._strip = None
        seen = self.space.mask.visible(queries, slice(0, self.space.n_keys), batch, heads)
        seen = torch.ones((), dtype=torch.bool) if seen is None else seen
        seen = seen.to(p.device).expand(shape)
        p = torch.where(seen, p.double(), 0.0)  # tiles have a floor where a key is hidden
        of = WholeRows(p, seen, self.space.offset, self.space.n_queries, self.options, queries.start, batch=batch)
        for out, value in defined(self.name, self.outputs, self.define, of).items():
            if tuple(value.shape[:3]) != shape[:3]:
                raise CaptureError(
                    f'the definition of "{self.name}" must give [batch, head, query] = {list(shape[:3])}',
                    shape=value.shape,
                )
            if out not in self._found:
                self._found[out] = value.new_zeros(*self.space.shape[:3], *value.shape[3:])
            self._found[out][rows] = value

    def results(self) -> dict[str, Tensor]:
        return self._found
