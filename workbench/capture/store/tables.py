"""The tables of a store: a row per head and forward with the means of its statistics, and a row per token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.capture.settings import Settings
from workbench.capture.site_capture import Forward
from workbench.kernels.gradients import GRADIENT_SUMS
from workbench.kernels.statistics import STATISTICS, VALUE_WEIGHTED
from workbench.storage.store.growing_table import GrowingTable
from workbench.tokens import utf8

_HEADS = {"forward": "int64", "site": "category", "call": "int64", "layer": "int64", "kind": "category",
          "batch": "int64", "head": "int64"}  # fmt: skip
_TOKENS = {"forward": "int64", "stream": "category", "batch": "int64", "position": "int64", "id": "int64",
           "text": "category"}  # fmt: skip


def columns(settings: Settings) -> list[str]:
    """The statistics that have one number per head, or whose mean over positions is one."""
    found = []
    for name in settings.statistics:
        record = STATISTICS[name.removeprefix(VALUE_WEIGHTED)]
        if record.axes in ("query", "key", ""):
            weighted = VALUE_WEIGHTED if name.startswith(VALUE_WEIGHTED) else ""
            found += [f"{weighted}{output}" for output in record.outputs]
    return [*found, *(GRADIENT_SUMS if settings.gradients else ())]


class Tables:
    """Both tables; `add` gives them the rows of a forward."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._columns = columns(settings)
        self._heads = GrowingTable(
            folder / "heads", _HEADS | dict.fromkeys(self._columns, "float64"), numbered="forward"
        )
        self._tokens = GrowingTable(folder / "tokens", _TOKENS, numbered="forward")
        self._has = [0, 0]

    def open(self) -> int:
        """Go on with what is there; the first forward that one of them lacks.

        Raises:
            FileError: they cannot be written.
        """
        self._has = [self._heads.open(), self._tokens.open()]
        return min(self._has)

    def add(self, forward: Forward, index: int) -> None:
        """Add the rows of a forward, where they are not there yet.

        Raises:
            FileError: they cannot be written.
        """
        if index >= self._has[0]:
            self._heads.add(self._of_heads(forward, index))
        if index >= self._has[1]:
            self._tokens.add(_of_tokens(forward, index))

    def _of_heads(self, forward: Forward, index: int) -> dict[str, list[Any]]:
        rows: dict[str, list[Any]] = {name: [] for name in (*_HEADS, *self._columns)}
        for c in forward.sites.values():
            batch, heads = c.shape[:2]
            n = batch * heads
            facts = (index, c.site.path, c.site.call, c.site.layer, c.site.kind)
            for name, value in zip(_HEADS, facts, strict=False):
                rows[name] += [value] * n
            rows["batch"] += [b for b in range(batch) for _ in range(heads)]
            rows["head"] += list(range(heads)) * batch
            for name in self._columns:
                held = c.statistics.get(name)
                rows[name] += [None] * n if held is None else _mean(held).flatten().tolist()
        return rows


def _mean(values: Tensor) -> Tensor:
    """[batch, head], as `Capture.table` has it."""
    wide = values.detach().double()
    return wide if wide.dim() == 2 else wide.nanmean(-1)


def _of_tokens(forward: Forward, index: int) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {name: [] for name in _TOKENS}
    for stream, ids in forward.ids.items():
        batch, length = ids.shape
        n = batch * length
        rows["forward"] += [index] * n
        rows["stream"] += [stream] * n
        rows["batch"] += torch.arange(batch).repeat_interleave(length).tolist()
        rows["position"] += list(range(length)) * batch
        rows["id"] += ids.flatten().tolist()
        known = forward.tokens.get(stream)
        rows["text"] += [None] * n if known is None else [utf8(text) for row in known for text in row]
    return rows
