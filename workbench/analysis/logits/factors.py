"""Numbers by which a model multiplies what heads and MLPs write before it adds them to the stream, as Granite does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workbench.analysis.circuits.model.recording import Recording, factors_between
from workbench.hooks.sites import Site


def find_factors(
    seen: Recording, sites: Sequence[Site], block: str, written: Sequence[str]
) -> tuple[list[float], tuple[str, float] | None] | None:
    """By what each part of a block is multiplied, so that with one module more, or none, they make what it gives.

    Args:
        sites: of its attentions. written: names of the modules whose outputs they add to the stream.

    Returns:
        A factor for each of `written`, and the module beside them with its own; None where there are no such numbers.
    """
    before, after = seen.given[block], seen.gave[block]
    if any(seen.gave[name].shape != after.shape for name in written) or before.shape != after.shape:
        return None  # several streams (Gemma 3n)
    attention = tuple(site.name for site in sites)
    beside = [
        name
        for name in dict.fromkeys(seen.order)
        if name.startswith(f"{block}.") and seen.times[name] == 1 and name not in written
        and getattr(seen.gave.get(name), "shape", None) == after.shape
        and not any(one == name or one.startswith(f"{name}.") or name.startswith(f"{one}.") for one in attention)
    ]  # fmt: skip
    for name in [*([None] if written else []), *sorted(beside, key=lambda each: each.count("."))]:
        parts = torch.stack([seen.gave[one].double() for one in (*written, *([] if name is None else [name]))], -1)
        found = factors_between(before, parts, after, seen.eps)
        if found is not None:
            factors = [float(factor) for factor in found]
            return (factors, None) if name is None else (factors[:-1], (name, factors[-1]))
    return None
