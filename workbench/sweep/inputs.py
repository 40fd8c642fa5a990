"""What a sweep is given: its batches and metrics, checked, and what tells one sweep from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

from torch import Tensor, nn

from workbench.errors import CaptureError, FormatError, WorkbenchError
from workbench.inputs import check_inputs
from workbench.session.workbench import Workbench
from workbench.sweep.variants import Resolved, about


def check_batches(model: nn.Module, batches: Any) -> list[Any]:
    """The batches as a list.

    Raises:
        WorkbenchError: there is none; there are fewer than their length says; one is no dict of inputs, is empty, does
            not fit the model, or has a cache in it, which would change from one run to the next.
    """
    if isinstance(batches, Mapping):
        batches = [batches]
    if not isinstance(batches, Iterable) or isinstance(batches, (str, Tensor)):
        raise WorkbenchError(f"batches are dicts of model inputs, not {type(batches).__name__}")
    expected = len(batches) if isinstance(batches, Sized) else None
    found = list(batches)
    if expected is not None and len(found) != expected:
        raise WorkbenchError(f"the batches end early: {len(found)} came of {expected}")
    if not found:
        raise WorkbenchError("there is no batch", hint="has the generator been used up already? pass a list")
    for number, batch in enumerate(found):
        if not isinstance(batch, Mapping):
            raise WorkbenchError(f"batch {number} is {type(batch).__name__}, expected a dict of model inputs")
        if "past_key_values" in batch:
            raise WorkbenchError(f"batch {number} goes on from a cache", hint="run whole sequences")
        if not any(isinstance(value, Tensor) and value.dim() > 0 for value in batch.values()):
            raise WorkbenchError(f"batch {number} holds no tensor")
        if size_of(batch) == 0:
            raise WorkbenchError(f"batch {number} is empty: it has no example")
        try:
            check_inputs(model, (), batch)
        except CaptureError as error:
            raise WorkbenchError(f"in batch {number}, {error.message}", shape=error.shape, hint=error.hint) from None
    return found


def size_of(batch: Mapping[str, Any]) -> int:
    """How many examples a batch has: the first axis of its widest tensor."""
    found = [value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0]
    deep = [value for value in found if value.dim() > 1] or found
    first = {value.shape[0] for value in deep}
    return 0 if 0 in first else max(first)


def identity(
    wb: Workbench,
    variants: Sequence[Resolved],
    base: Sequence[Resolved],
    batches: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    reference: Any,
    seed: int,
    **settings: Any,
) -> dict[str, Any]:
    """What two sweeps must share for one to go on from the other's file; plain values."""
    return {
        "model class": f"{type(wb.model).__module__}.{type(wb.model).__qualname__}",
        "model weights": wb.weights_identity(),
        "variants": digest([one.about for one in variants]),
        "number of variants": len(variants),
        "base": digest([one.about for one in base]),
        "data": digest([plain(batch) for batch in batches]),
        "number of batches": len(batches),
        "reference": digest(plain(reference)) if any("reference" in one.about for one in (*variants, *base)) else "",
        "metrics": [f"{name} {about(metric)}" for name, metric in metrics.items()],
        "seed": seed,
        **settings,
    }


def check_resumed(held: Mapping[str, Any], now: Mapping[str, Any], name: str, what: str = "sweep") -> None:
    """Raise a FormatError that says in what the sweep (or other run) of a file differs from this one."""
    differ = [key for key in now if held.get(key) != now[key]]
    if not differ:
        return
    shown = [
        f"{key} ({held.get(key)} there, {now[key]} here)"
        if isinstance(now[key], (int, float)) or key in ("mode", "ablation", "task")
        else key
        for key in differ
    ]
    raise FormatError(
        f"{name} is of another {what}: it differs in {', '.join(shown)}",
        hint="give a new file, or the model, data and settings of the old one",
    )


def plain(value: Any) -> str:
    """A text that differs where batches, or the answers that they carry, differ."""
    told = about(value)
    carried = {key: getattr(value, key, None) for key in ("answers", "wrong", "scored")}
    extra = [f"{key}={about(one)}" for key, one in carried.items() if one is not None]
    return " ".join([told, *extra])


def digest(value: Any) -> str:
    """SHA-256 of a value of JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
