"""Logits at the positions that the metrics read, and nowhere else: over a large vocabulary they cost as much as blocks.

A `Metric` says by `reads` what it needs: `reads(batch)` gives token positions, or None for all. Where every
metric does so and the model takes `logits_to_keep`, as those of transformers do, the others are never computed. They
stand as NaN in the output, so that a metric which reads more than it said is found out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workbench.metrics import Metric

ARGUMENT = "logits_to_keep"


def places_read(model: nn.Module, metrics: Iterable[Metric], batch: Mapping[str, Any]) -> Tensor | None:
    """The token positions that the metrics read of a batch, in rising order; None if they may read all."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ARGUMENT in batch or "labels" in batch:
        return None
    if ARGUMENT not in inspect.signature(model.forward).parameters:
        return None
    found = []
    for metric in metrics:
        places = None if metric.reads is None else metric.reads(batch)
        if places is None:
            return None
        found.append(torch.as_tensor(places).flatten())
    read = torch.cat(found).unique().to(ids.device)
    return read if len(read) < ids.shape[1] else None


def widened(output: Any, places: Tensor, length: int) -> Any:
    """The output with logits [batch, length, vocabulary]: those at the places, and NaN elsewhere.

    An output whose logits are not those of the places is handed back as it is.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != len(places):
        return output
    whole = logits.new_full((logits.shape[0], length, logits.shape[2]), torch.nan)
    whole[:, places] = logits
    output.logits = whole
    return output
