"""Several forwards as one: their batches joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.capture.site_capture import KEPT, Forward
from workbench.errors import CaptureError
from workbench.hooks.projections import Projection
from workbench.hooks.tap import StateLink

_PER_EXAMPLE = tuple(KEPT.values())  # what a site capture holds per batch entry, if it does


def pool(forwards: Sequence[Forward]) -> Forward:
    """The forwards one after the other along the batch, without their patterns.

    Raises:
        CaptureError: they differ in sites or in a site's [head, query, key].
    """
    first = forwards[0]
    joined = Forward(0)
    for name, capture in first.sites.items():
        parts = [f.sites.get(name) for f in forwards]
        if any(p is None or p.shape[1:] != capture.shape[1:] for p in parts):
            shapes = ["none" if p is None else str(list(p.shape)) for p in parts]
            raise CaptureError(
                f"the forwards differ: {', '.join(shapes)}", site=name, hint="compare cap.calls one by one"
            )
        same = [p for p in parts if p is not None]
        kept: dict[str, Any] = {field: _joined([getattr(p, field) for p in same]) for field in _PER_EXAMPLE}
        joined.sites[name] = replace(
            capture,
            shape=(sum(p.shape[0] for p in same), *capture.shape[1:]),
            statistics={
                s: torch.cat([p.statistics[s] for p in same])
                for s in capture.statistics
                if all(s in p.statistics for p in same)
            },
            **kept,
            projection=Projection.of_all([p.projection for p in same])
            if len({p.entering is None for p in same}) == 1
            else None,
            lazy=None,
            others={},
            held=[],
            times=None,
            state=StateLink(),
        )
    for stream in first.ids:
        rows = [f.ids.get(stream) for f in forwards]
        if all(r is not None and r.shape[1] == first.ids[stream].shape[1] for r in rows):
            joined.ids[stream] = torch.cat([r for r in rows if r is not None])
            joined.tokens[stream] = [row for f in forwards for row in f.tokens.get(stream, [])]
    return joined


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Parts of a batch as one; None unless all are there."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(parts) else None
