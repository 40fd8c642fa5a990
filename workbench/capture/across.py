"""Captures of processes that each hold a part of the sequence, or a part of the layers, put together in each of them.

Only statistics travel: rows are put side by side, sums over queries are added up, sites of stages are listed one behind
the other. What each process has is told first, in a few words; whether that fits is then known to all, so that either
every process goes on or every process raises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.capture.site_capture import Forward, SiteCapture
from workbench.errors import CaptureError
from workbench.hooks.sites import Site
from workbench.kernels.sequence_parallel.split import SplitSequence
from workbench.kernels.statistics import STATISTICS, VALUE_WEIGHTED, output_names

_SUMS = ("received", "received_mean")


def bytes_of(forwards: Sequence[Forward], split: SplitSequence) -> int:
    """What this process will send when a capture is put together, but for the few words that go before."""
    total = 0
    for forward in forwards:
        total += sum(_room(ids, split, axis=1) for ids in forward.ids.values())
        for capture in forward.sites.values():
            for name, tensor in capture.statistics.items():
                whole = tensor.shape[0] * tensor.shape[1] * sum(split.lengths) * tensor.element_size()
                total += whole if name in _SUMS else _room(tensor, split, axis=2)
    return total if split.size > 1 else 0


def _room(tensor: Tensor, split: SplitSequence, axis: int) -> int:
    return tensor.nbytes // tensor.shape[axis] * max(split.lengths)


def across_sequence(forwards: Sequence[Forward], split: SplitSequence, facts: dict[str, Any]) -> list[Forward]:
    """The forwards of the whole sequence; see `Capture.gathered`.

    Args:
        facts: what has to be the same everywhere besides what was captured, such as the weights' hash.
    """
    _agreed(split, lambda: [_rows(forward, split) for forward in forwards], facts)
    return [_joined(forward, split) for forward in forwards]


def across_stages(
    forwards: Sequence[Forward], split: SplitSequence, sites: Sequence[Site], facts: dict[str, Any]
) -> tuple[list[Forward], list[Site]]:
    """The forwards with the sites of all stages, and these sites, numbered through.

    Args:
        split: of as many positions as there are stages, which only says who belongs to the group.
    """
    own = [
        {
            "sites": {name: _described(capture) for name, capture in forward.sites.items()},
            "ids": {stream: [_hash(ids), str(ids.dtype), list(ids.shape)] for stream, ids in forward.ids.items()},
        }
        for forward in forwards
    ]
    told = _agreed(split, lambda: [{} for _ in forwards], facts, own=[*own, [asdict(site) for site in sites]])
    everywhere: list[Site] = []
    for stage in told:
        several = [Site(**one) for one in stage[-1]]
        kinds = {(site.tower, site.kind) for site in several}
        behind = {kind: _behind(kind, everywhere, several) for kind in kinds}
        everywhere += [replace(site, layer=site.layer + behind[site.tower, site.kind]) for site in several]
    names = [site.name for site in everywhere]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CaptureError(
            f"several stages have a site of the name {twice[0]}",
            hint="let each stage keep the names of the whole model: delete the layers of others, and renumber none",
        )
    known = {site.name: site for site in everywhere}
    made = []
    for index, forward in enumerate(forwards):
        found: dict[str, tuple[int, SiteCapture]] = {}
        for rank, stage in enumerate(told):
            for name, described in stage[index]["sites"].items():
                mine = forward.sites.get(name) if rank == split.rank else None
                found[name] = _from(rank, described, mine, replace(known[name.partition("#")[0]], **described["seen"]))
        made.append(
            replace(forward, sites=_sent(found, split), ids=_ids(forward, [s[index]["ids"] for s in told], split))
        )
    return made, everywhere


def _agreed(
    split: SplitSequence, describe: Callable[[], list[dict[str, Any]]], facts: dict[str, Any], own: Any = None
) -> list[Any]:
    """What every process has to say of its own, once all have said the same of what should be the same.

    Raises:
        CaptureError: in every process, where one cannot go on or has something else.
    """
    failed, described = "", []
    try:
        described = describe()
    except CaptureError as error:  # the others wait to be told
        failed = str(error)
    told = split.told([failed, facts, described, own])
    broken = [f"in process {rank} of the group, {reason}" for rank, (reason, *_) in enumerate(told) if reason]
    if broken:
        raise CaptureError(broken[0])
    for rank, (_, other, captured, _) in enumerate(told):
        what = next((name for name, value in told[0][1].items() if other.get(name) != value), "")
        if not what and captured != told[0][2]:
            what = _first(told[0][2], captured)
        if what:
            raise CaptureError(
                f"process {rank} of the group has something else than process 0: {what}",
                hint="run the same model and the same inputs with the same capture(...) in every process",
            )
    return [mine for *_, mine in told]


def _first(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> str:
    """Where two descriptions differ first."""
    if len(one) != len(other):
        return f"{len(other)} forwards and not {len(one)}"
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        if list(a) != list(b):
            return f"forward {number} went through other sites, or in another order"
        for name in a:
            if a[name] != b[name]:
                return f"forward {number} differs at {name!r}"
    return "something"


def _rows(forward: Forward, split: SplitSequence) -> dict[str, Any]:
    """What has to be the same in all processes of a forward of a part of the sequence."""
    n_here, end = split.lengths[split.rank], split.here.stop
    told: dict[str, Any] = {}
    for name, capture in forward.sites.items():
        batch, heads, queries, keys = capture.shape
        if (queries, keys) != (n_here, end) or capture.site.kind != "self":
            raise CaptureError(
                f"its map is of {queries} queries and {keys} keys, and process {split.rank} holds {n_here} of {end}",
                site=name, hint="open split_over(split) around the model's calls",
            )  # fmt: skip
        blocks = [key for key in capture.statistics if key not in _SUMS and not _of_rows(key)]
        if blocks:
            raise CaptureError(
                f"{', '.join(blocks)} cannot be added up over processes", site=name,
                hint=f"statistics of rows, {' and '.join(_SUMS)} can",
            )  # fmt: skip
        told[name] = [batch, heads, capture.kernel, [[key, str(t.dtype), *t.shape[3:]] for key, t in
                      sorted(capture.statistics.items()) if key not in _SUMS]]  # fmt: skip
    return told | {f"ids of {stream}": list(ids.shape[:1]) for stream, ids in forward.ids.items()}


def _of_rows(name: str) -> bool:
    """Whether a tensor of a statistic is [batch, head, query, …]."""
    base = name.removeprefix(VALUE_WEIGHTED)
    outputs = {out: statistic for statistic in STATISTICS for out in output_names(statistic)}
    return base in outputs and not STATISTICS[outputs[base]].of_columns


def _joined(forward: Forward, split: SplitSequence) -> Forward:
    n = sum(split.lengths)
    made = {}
    for name, capture in forward.sites.items():
        found = {}
        for key, tensor in capture.statistics.items():
            found[key] = _summed(key, tensor, split) if key in _SUMS else _side_by_side(tensor, split, axis=2)
        made[name] = replace(
            capture, shape=(*capture.shape[:2], n, n), statistics=found, z=None, z_gradient=None, entering=None,
            projection=None, stored_result=None, weights=None, lazy=None, others={}, held=[],
        )  # fmt: skip
    ids = {stream: _side_by_side(one, split, axis=1) for stream, one in forward.ids.items()}
    return replace(forward, sites=made, ids=ids, tokens={})


def _side_by_side(tensor: Tensor, split: SplitSequence, axis: int) -> Tensor:
    """Parts of all processes along an axis of positions."""
    own = tensor.movedim(axis, 0)
    room = own.new_zeros(max(split.lengths), *own.shape[1:])
    room[: len(own)] = own
    parts = split.gather(room).wait()
    return torch.cat([part[:n] for part, n in zip(parts, split.lengths, strict=True)]).movedim(0, axis)


def _summed(name: str, tensor: Tensor, split: SplitSequence) -> Tensor:
    """What keys receive from the queries of all processes."""
    n, here = sum(split.lengths), split.here
    at = torch.arange(n, device=tensor.device)
    if name == "received_mean":  # over the queries here that see a key
        tensor = tensor * (here.stop - at[: here.stop].clamp(min=here.start))
    total = split.summed(F.pad(tensor, (0, n - tensor.shape[2])))
    return total / (n - at) if name == "received_mean" else total


def _behind(kind: tuple[str, str], before: Sequence[Site], stage: Sequence[Site]) -> int:
    """By how much a stage's layers of a kind are numbered on; by nothing where their names count through the model."""
    last = max((site.layer for site in before if (site.tower, site.kind) == kind), default=-1)
    first = min(site.layer for site in stage if (site.tower, site.kind) == kind)
    return 0 if first > last else last + 1


def _ids(forward: Forward, told: Sequence[dict[str, Any]], split: SplitSequence) -> dict[str, Tensor]:
    """The ids that went into the first stage that has any, in all of them.

    Raises:
        CaptureError: stages that have ids have others.
    """
    found = {}
    for stream in dict.fromkeys(stream for stage in told for stream in stage):
        having = [(rank, stage[stream]) for rank, stage in enumerate(told) if stream in stage]
        for rank, other in having:
            if other != having[0][1]:
                raise CaptureError(f"process {rank} of the group has other ids than process {having[0][0]}")
        rank, (_, dtype, shape) = having[0]
        mine = forward.ids.get(stream)
        room = torch.zeros(shape, dtype=getattr(torch, dtype.removeprefix("torch."))) if mine is None else mine
        found[stream] = split.sent_by(rank, room)
    return found


def _hash(ids: Tensor) -> str:
    return hashlib.sha256(ids.cpu().contiguous().numpy().tobytes()).hexdigest()


def _described(capture: SiteCapture) -> dict[str, Any]:
    """A site of another stage, in words: enough to make room for its statistics."""
    site = capture.site
    return {
        "shape": list(capture.shape), "kernel": capture.kernel, "signed": capture.signed,
        "normalised": capture.normalised, "n_calls": capture.n_calls,
        "statistics": {key: [str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in
                       capture.statistics.items()},
        "seen": {"name": site.name, "n_heads": site.n_heads, "n_kv_heads": site.n_kv_heads, "d_head": site.d_head,
                 "windows": site.windows, "call": site.call},
    }  # fmt: skip


def _from(rank: int, told: dict[str, Any], mine: SiteCapture | None, site: Site) -> tuple[int, SiteCapture]:
    room = {
        key: torch.zeros(shape, dtype=getattr(torch, dtype)) if mine is None else mine.statistics[key]
        for key, (dtype, shape) in told["statistics"].items()
    }
    batch, heads, queries, keys = told["shape"]
    return rank, SiteCapture(
        site, (batch, heads, queries, keys), room, told["kernel"], signed=told["signed"],
        normalised=told["normalised"], n_calls=told["n_calls"],
    )  # fmt: skip


def _sent(found: dict[str, tuple[int, SiteCapture]], split: SplitSequence) -> dict[str, SiteCapture]:
    """The sites with the statistics of those who have them."""
    return {
        name: replace(capture, statistics={key: split.sent_by(rank, t) for key, t in capture.statistics.items()})
        for name, (rank, capture) in found.items()
    }
