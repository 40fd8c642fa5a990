"""Numbers of heads: the means of a capture's statistics, or scores in the forms in which they are given."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench.analysis.statistics.intervals import means_t
from workbench.capture.capture import Capture
from workbench.capture.padding import without_padding
from workbench.counting import count
from workbench.errors import ReportError
from workbench.hooks.sites import Kind, Site
from workbench.views.base.given import real_numbers
from workbench.views.head_atlas.quantities import Quantity, quantity

_ALIAS = re.compile(r"(.+)\.\d+\.(attn|cross_attn)")
_FEW = 5  # batch entries below which an interval says nothing
Scores = Any  # {(layer, head): value}, an array [layer, head], or a frame with layer, head, value, (low, high, site)


def of_capture(capture: Capture) -> tuple[list[Site], dict[str, Quantity], Any, Any, Any, str]:
    """Sites, metrics, and [metric, head] means and intervals over all batch entries of all forwards."""
    calls = capture.calls
    sites = {c.site.name: c.site for call in calls for c in call}
    if not sites:
        raise ReportError("the capture is empty", hint="call the model inside `with wb.capture() as cap:`")
    n_heads: dict[str, int] = {}
    for call in calls:
        for c in call:
            n_heads[c.site.name] = max(n_heads.get(c.site.name, 0), c.shape[1])
    metrics = {name: m for name in capture.statistics if (m := quantity(name)) is not None}
    total = sum(n_heads.values())
    values, low, high = (np.full((len(metrics), total), np.nan) for _ in range(3))
    entries = 0
    for i, name in enumerate(metrics):
        start = 0
        counted: set[tuple[int, int]] = set()
        for site in sites:
            those = [c for call in calls for c in call if c.site.name == site and name in c.statistics]
            kept = [without_padding(c, name) for c in those]
            if kept:
                each = torch.cat([_per_entry(tensor) for tensor in kept])  # [entry, head]
                counted.add(_counted(kept))
                entries = max(entries, len(each))
                place = slice(start, start + each.shape[1])
                values[i, place] = each.nanmean(0).numpy()
                if len(each) >= _FEW:
                    low[i, place], high[i, place] = means_t(each.T).T.numpy()
            start += n_heads[site]
        metrics[name] = replace(metrics[name], meaning=metrics[name].meaning + _over(counted))
    resized = [replace(site, n_heads=n_heads[name]) for name, site in sites.items()]
    over = f"Means over the queries of {count(entries, 'sequence')}" if entries else "No statistics"
    return resized, metrics, values, low, high, over


def _counted(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """How many queries have a statistic, and how many there are; one for each entry where there are no queries."""
    known = [tensor.isfinite().any(1).flatten() for tensor in tensors]
    return sum(int(each.sum()) for each in known), sum(len(each) for each in known)


def _over(counted: set[tuple[int, int]]) -> str:
    """How many queries a mean is over, where some do not have what is averaged."""
    if all(some == every for some, every in counted):
        return ""
    fewest, most = min(counted), max(counted)
    some = f"{fewest[0]:,}" if fewest[0] == most[0] else f"{fewest[0]:,} to {most[0]:,}"
    return f"; the mean is over {some} of {most[1]:,} queries, since the others have none"


def _per_entry(tensor: torch.Tensor) -> torch.Tensor:
    """[entry, head] from [batch, head] or [batch, head, query]; queries without one do not count."""
    tensor = tensor.detach().double().cpu()
    return tensor if tensor.dim() == 2 else tensor.nanmean(-1)


def of_scores(
    source: Any, unit: str, signed: bool | None, kind: Kind, meanings: Mapping[str, str] | None = None
) -> tuple[list[Site], dict[str, Quantity], Any, Any, Any]:
    given = source if isinstance(source, Mapping) else {"value": source}
    frames = {label: frame_of(scores) for label, scores in given.items()}
    if not frames or any(frame.empty for frame in frames.values()):
        raise ReportError("there is no head to show", hint='pass {"importance": {(layer, head): value}}')
    every = pd.concat(list(frames.values()))
    sites: list[Site] = []
    starts: dict[tuple[int, str], int] = {}
    start = 0
    largest = every.groupby(["layer", "site"], sort=True)["head"].max().reset_index()
    for layer, name, head in zip(largest["layer"], largest["site"], largest["head"], strict=True):
        heads = int(head) + 1
        starts[int(layer), str(name)] = start
        sites.append(_site(str(name), int(layer), kind, heads))
        start += heads
    values, low, high = (np.full((len(frames), start), np.nan) for _ in range(3))
    for i, frame in enumerate(frames.values()):
        at = [
            starts[int(la), str(n)] + int(h)
            for la, n, h in zip(frame["layer"], frame["site"], frame["head"], strict=True)
        ]
        for block, column in ((values, "value"), (low, "low"), (high, "high")):
            block[i, at] = frame[column].to_numpy(float)
    metrics = {}
    for i, label in enumerate(frames):
        is_signed = bool(np.nanmin(values[i], initial=0) < 0) if signed is None else signed
        metrics[label] = Quantity(label, unit, (meanings or {}).get(label, ""), is_signed)
    return sites, metrics, values, low, high


def _site(name: str, layer: int, kind: Kind, heads: int) -> Site:
    """A site whose scores are given; an alias such as decoder.0.cross_attn tells its tower and kind."""
    found = _ALIAS.fullmatch(name)
    if found is None or found[1] == "blocks":
        return Site(name, layer, kind, heads)
    return Site(name, layer, "cross" if found[2] == "cross_attn" else kind, heads, tower=found[1])


def frame_of(scores: Scores) -> pd.DataFrame:
    """layer, head, site, value, low, high."""
    if isinstance(scores, Mapping):
        frame = pd.DataFrame(
            [(*key, float(value)) for key, value in scores.items()], columns=["layer", "head", "value"]
        )
    elif isinstance(scores, pd.DataFrame):
        missing = {"layer", "head", "value"} - set(scores.columns)
        if missing:
            raise ReportError(f"the scores have no column {sorted(missing)[0]!r}", hint="layer, head, value")
        frame = scores
    else:
        array = real_numbers(scores, "a score")
        if array.ndim != 2:
            raise ReportError("scores as an array are [layer, head]", shape=array.shape)
        layers, heads = np.indices(array.shape)
        frame = pd.DataFrame({"layer": layers.ravel(), "head": heads.ravel(), "value": array.ravel()})
    missing_columns = {
        name: default for name, default in (("low", np.nan), ("high", np.nan), ("site", "")) if name not in frame
    }
    return frame.assign(**missing_columns)
