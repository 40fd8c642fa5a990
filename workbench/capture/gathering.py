"""Captures of a model whose heads are split over several processes, put together in each of them.

First the processes tell each other what they have; whether that is the same, and makes up all heads, is then known to
all, so that either every process goes on or every process raises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from workbench.capture.site_capture import Forward, SiteCapture
from workbench.errors import CaptureError
from workbench.hooks.head_shards import HeadShard
from workbench.hooks.sites import all_here
from workbench.kernels.patterns import PartOfHeads, Pattern

# Which axis of a pattern's tensors counts heads, in families whose heads can be put together.
_HEADS = {
    "SoftmaxPattern": {"q": 1, "k": 1, "lse": 1, "values": 1, "sinks": 0, "key_bias": 1, "mask": 1},
    "DensePattern": {"weights": 1, "values": 1, "mask": 1},
    "SignedPattern": {"weights": 1, "values": 1, "mask": 1},
}


def gather(forwards: Sequence[Forward], *, result: bool) -> list[Forward]:
    """The forwards with all heads; see `Capture.gathered`."""
    shard = next(c.shard for f in forwards for c in f.sites.values() if c.site.here is not None)
    if shard is None:
        raise CaptureError(
            "a capture from a file does not know the processes that hold its other heads",
            hint="gather before it is saved",
        )
    failed = ""
    try:
        forwards = [_with_results(forward) for forward in forwards] if result else forwards
        described = [_described(forward) for forward in forwards]
    except CaptureError as error:  # the others wait to be told
        failed, described = str(error), []
    told = shard.told((failed, described))
    broken = [f"in process {rank} of the group, {reason}" for rank, (reason, _) in enumerate(told) if reason]
    if broken:
        raise CaptureError(broken[0])
    every = [captured for _, captured in told]
    differing = [rank for rank, captured in enumerate(every) if captured != every[0]]
    if differing:
        raise CaptureError(
            f"process {differing[0]} of the group has captured something else than process 0: "
            f"{_first(every, differing)}",
            hint="run the same inputs with the same capture(...) in every process",
        )
    return [_whole(forward) for forward in forwards]


def _with_results(forward: Forward) -> Forward:
    made = {
        name: replace(c, stored_result=c.result(limit=None)) if c.has_result else c for name, c in forward.sites.items()
    }
    return replace(forward, sites=made)


def _described(forward: Forward) -> dict[str, Any]:
    """What has to be the same in all processes: what was captured of what, in which shapes."""
    told: dict[str, Any] = {
        f"ids of {stream}": hashlib.sha256(ids.cpu().contiguous().numpy().tobytes()).hexdigest()
        for stream, ids in forward.ids.items()
    }
    for name, capture in forward.sites.items():
        tensors = {key: (tuple(t.shape), str(t.dtype)) for key, t in _tensors(capture).items()}
        told[name] = (capture.shape, capture.kernel, tensors, None if capture.lazy is None else _facts(capture.pattern))
    return told


def _facts(pattern: Pattern) -> Any:
    """The pattern's family and facts, and the shapes of its tensors; heads may differ in number."""
    if not isinstance(pattern, PartOfHeads):
        return type(pattern).__name__
    facts, tensors = pattern.here.state()
    axes = _HEADS.get(type(pattern.here).__name__, {})
    shapes = {
        name: [n for axis, n in enumerate(t.shape) if axis != axes.get(name)] + [str(t.dtype)]
        for name, t in tensors.items()
    }
    return type(pattern.here).__name__, facts, shapes


def _first(every: Sequence[Any], differing: Sequence[int]) -> str:
    """Where two descriptions differ first."""
    one, other = every[0], every[differing[0]]
    if len(one) != len(other):
        return f"{len(other)} forwards and not {len(one)}"
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        for name in dict.fromkeys((*a, *b)):
            if a.get(name) != b.get(name):
                return f"forward {number} differs at {name!r}"
    return "something"


def _tensors(capture: SiteCapture) -> dict[str, Tensor]:
    """What a site capture holds of each head, by name."""
    kept = {"z": capture.z, "z_gradient": capture.z_gradient, "stored_result": capture.stored_result,
            "weights": capture.weights}  # fmt: skip
    return {f"statistic {name}": t for name, t in capture.statistics.items()} | {
        name: tensor for name, tensor in kept.items() if tensor is not None
    }


def _whole(forward: Forward) -> Forward:
    """The forward with all heads."""
    made: dict[str, SiteCapture] = {}
    for name, capture in forward.sites.items():
        shard = capture.shard
        if shard is None:
            made[name] = capture
            continue
        held = {
            key: shard.gathered(shard.narrowed(t, axis), axis)
            for key, t in _tensors(capture).items()
            for axis in [2 if key in ("z", "z_gradient", "stored_result") else 1]
        }
        statistics = {key: held.pop(f"statistic {key}") for key in capture.statistics}
        lazy = _pattern(capture.lazy.here, shard) if isinstance(capture.lazy, PartOfHeads) else capture.lazy
        made[name] = replace(
            capture,
            site=all_here(capture.site),
            statistics=statistics,
            lazy=lazy,
            others={},
            held=[],
            shard=None,
            projection=None,
            **held,  # type: ignore[arg-type]
        )
    return replace(forward, sites=made)


def _pattern(here: Pattern, shard: HeadShard) -> Pattern | None:
    """A pattern with all heads; None for families whose heads cannot be put together."""
    axes = _HEADS.get(type(here).__name__)
    if axes is None:
        return None
    facts, tensors = here.state()
    whole = {}
    for name in sorted(tensors):
        tensor, axis = tensors[name], axes[name]
        for_all = name == "mask" and tensor.shape[1] == 1
        whole[name] = tensor if for_all else shard.gathered(tensor, axis)
    return here.rebuild(facts, whole)
