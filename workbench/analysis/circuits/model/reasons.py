"""Why a model's stream is no sum over heads and MLPs: what stands in between, where it can be named."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.analysis.circuits.model.recording import Recording, equal, same_sum

INSTEAD = (
    "circuits need a stream that is a sum over heads and MLPs; head_importance, run_sweep, wb.ablate and wb.patch "
    "measure and change heads of any model"
)
"""What is to be done instead."""


def two_mixers(seen: Recording, block: str, first: str, second: str) -> str:
    """What two modules of one block that mix positions have to do with each other."""
    before, after = seen.given[block], seen.gave[block]
    for alone, other in ((first, second), (second, first)):
        gave = seen.gave.get(alone)
        if gave is not None and same_sum(after, before + gave, before.abs() + gave.abs(), seen.eps):
            return (
                f"the block {block} has two modules that mix positions, and what {other} makes is no part of the "
                f"stream: it only enters what {alone} reads"
            )
    return (
        f"the block {block} has two modules that mix positions, {first} and {second}, which read the stream beside "
        "each other"
    )


def why_no_sum(
    seen: Recording, site: str, block: str, before: Tensor, attention: Tensor, after: Tensor, out: str
) -> str:
    """What stands between the heads of a site, or none, and the stream, where it can be named."""
    if normed := _normed_stream(seen, block, before, attention):
        return normed
    for name in dict.fromkeys(seen.order):
        if not name.startswith(f"{block}.") or site.startswith(f"{name}.") or name == out:
            continue
        gave, given = seen.gave.get(name), seen.given.get(name)
        if gave is None or given is None or gave.shape != after.shape or equal(gave, given):
            continue
        if equal(given, attention):
            return f"what they write goes through {name} first, and is no sum over heads behind a norm"
        if equal(gave, after) and not site.startswith(name):
            return f"the stream itself goes through {name}, and is no sum of what was written behind a norm"
    return "a scale, or two MLPs?"


def _normed_stream(seen: Recording, block: str, before: Tensor, attention: Tensor) -> str | None:
    """Which norm takes the stream's place before anything is added to it, and with which factors, if one does."""
    inside = [name for name in dict.fromkeys(seen.order) if name.startswith(f"{block}.") and seen.times[name] == 1]
    for norm in inside:
        made = seen.gave.get(norm)
        if made is None or made.shape != before.shape or not equal(seen.given.get(norm), before) or equal(made, before):
            continue
        parts = torch.stack([made, attention], dim=-1).double()
        for reader in inside:
            given = seen.given.get(reader)
            if given is None or given.shape != before.shape or equal(given, made) or equal(given, attention):
                continue
            factors = torch.linalg.lstsq(parts.flatten(0, -2), given.double().flatten()[:, None]).solution[:, 0]
            if bool((factors.abs() > 1e-6).all()) and same_sum(
                given, parts @ factors, parts.abs() @ factors.abs(), seen.eps
            ):
                return (
                    f"the stream itself goes through {norm} before what they write is added, as {factors[0]:.3g} times "
                    f"what that gives and {factors[1]:.3g} times what they write"
                )
    return None
