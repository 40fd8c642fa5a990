"""Statistics of many documents of mixed length on several workers, attention apart from the model that it is of.

A capture that keeps queries and keys is the cheap part; the pass over all pairs of them is work that any worker can do
for any rows. Documents are cut and given out by the planner of core attention disaggregation (arXiv 2510.18121): every
worker has as many pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from workbench.capture.capture import Capture
from workbench.errors import CaptureError
from workbench.kernels.disaggregation import Item, Sizes, packed, plan
from workbench.kernels.masks import Mask
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import known
from workbench.workers.engine import Engine, opened
from workbench.workers.protocol import Job

PLANNED, ROUND_ROBIN = "planned", "round-robin"


@dataclass(frozen=True)
class Task:
    """Rows of one document at one site: its queries [1, head, row, d], and the keys that they read."""

    document: int
    site: str
    item: Item
    q: Tensor
    k: Tensor
    scale: float


def document_statistics(
    captures: Sequence[Capture], names: Sequence[str], *, engine: str | Engine = "ray", how: str = PLANNED
) -> list[dict[str, dict[str, Tensor]]]:
    """Statistics of rows of documents that were captured with their queries and keys.

    Args:
        captures: of one forward of one row each, such as `cap.calls` of `wb.capture(())`; causal self-attention.
        names: of statistics of rows.
        engine: who computes; "ray", or a `workbench.RayWorkers`.
        how: "planned", or "round-robin", which gives out whole documents in turn.

    Returns:
        For each document, by site and name, [1, head, query, …], up to rounding those of its own capture.

    Raises:
        CaptureError: queries and keys were not kept, maps that are not causal, or a statistic that is not of rows.
    """
    if how not in (PLANNED, ROUND_ROBIN):
        raise CaptureError(f"documents are given out {PLANNED} or {ROUND_ROBIN}, not {how!r}")
    columns = [name for name in names if known(name).of_columns]
    if columns:
        raise CaptureError(f"{', '.join(columns)} are sums over queries, which lie on several workers")
    patterns = [{one.site.name: _causal(one.pattern, one.site.name) for one in capture} for capture in captures]
    lengths = [next(iter(sites.values())).shape[2] for sites in patterns]
    with opened(engine) as workers:
        shares = shares_of(lengths, workers.n_workers, how, next(iter(patterns[0].values())))
        run = partial(attended, tuple(names))
        units = [list(_tasks(patterns, items)) for items in shares]
        found: list[dict[str, dict[str, Tensor]]] = [{name: {} for name in sites} for sites in patterns]
        for tasks, results in workers.over(Job(None, run, units, in_order=False)):
            for task, result in zip(tasks, results, strict=True):
                rows = torch.tensor(task.item.rows)
                held = found[task.document][task.site]
                for name, value in result.items():
                    whole = held.setdefault(name, value.new_zeros(*value.shape[:2], task.item.length, *value.shape[3:]))
                    whole[:, :, rows] = value
    return found


def shares_of(lengths: Sequence[int], n: int, how: str, pattern: SoftmaxPattern) -> list[list[Item]]:
    """Who computes which rows of which documents."""
    if how == ROUND_ROBIN:
        return [[Item.whole(d, lengths[d]) for d in range(first, len(lengths), n)] for first in range(n)]
    sizes = Sizes(pattern.shape[1], pattern.n_kv_heads, pattern.q.shape[-1], pattern.q.element_size())
    return [list(items) for items in plan(packed(lengths, n), sizes).items]


def attended(names: tuple[str, ...], tasks: Sequence[Task]) -> list[dict[str, Tensor]]:
    """What a worker finds of its tasks: by name [1, head, row, …], in the order of the items' rows."""
    found = []
    for task in tasks:
        parts, first = [], 0
        for rows in task.item.ranges:
            q, mask = task.q[:, :, first : first + len(rows)], Mask(len(rows), rows.stop, True, offset=rows.start)
            pattern = SoftmaxPattern(q, task.k[:, :, : rows.stop], mask, scale=task.scale)
            parts.append(pattern.statistics(list(names)))
            first += len(rows)
        found.append({name: torch.cat([part[name] for part in parts], dim=2) for name in parts[0]})
    return found


def _tasks(patterns: Sequence[dict[str, SoftmaxPattern]], items: Sequence[Item]) -> Iterator[Task]:
    for item in items:
        rows = torch.tensor(item.rows)
        for site, pattern in patterns[item.document].items():
            yield Task(item.document, site, item, pattern.q[:, :, rows], pattern.k[:, :, : item.n_keys], pattern.scale)


def _causal(pattern: Any, site: str) -> SoftmaxPattern:
    plain = isinstance(pattern, SoftmaxPattern) and pattern.softcap is None and pattern.sinks is None
    if not plain or pattern.key_bias is not None or pattern.shape[0] != 1 or pattern.shape[2] != pattern.shape[3]:
        raise CaptureError("documents are maps of causal softmax self-attention, one row each", site=site)
    mask, n = pattern.mask, pattern.shape[2]
    only = mask.causal and mask.offset == 0 and mask.window is None and mask.layout is None
    if mask.tensor is not None:
        seen = mask.tensor if mask.tensor.dtype == torch.bool else mask.tensor == 0
        only = bool((seen == torch.ones(n, n, dtype=torch.bool).tril()).all()) and mask.window is None
    if not only:
        raise CaptureError("rows of these documents see other keys than those before them", site=site)
    found: SoftmaxPattern = pattern
    return found
