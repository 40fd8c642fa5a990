"""`eviction`: which keys a cache would drop, by the weights of a capture, and what lies on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from workbench.analysis.eviction.result import Eviction
from workbench.capture.capture import Capture
from workbench.capture.site_capture import SiteCapture
from workbench.errors import CaptureError, expect, nearest
from workbench.kernels.patterns import Pattern

Policy = Literal["streaming", "h2o", "observed"]
_STRIP = 64  # queries at a time
_TAKES: dict[str, dict[str, tuple[int | None, int]]] = {
    "streaming": {"sinks": (4, 0), "recent": (64, 1)},
    "h2o": {"heavy": (32, 0), "recent": (32, 1)},
    "observed": {"heavy": (64, 1), "prompt": (None, 1)},
}  # of each policy, its numbers: what they are by default, and at least
Leaves = Callable[[Pattern, int, Tensor], Tensor]


def eviction(
    cap: Capture,
    policy: Policy = "h2o",
    *,
    sinks: int | None = None,
    heavy: int | None = None,
    recent: int | None = None,
    prompt: int | None = None,
) -> Eviction:
    """What each head would lose to a cache that drops keys: which ones, when, and the weight that later queries have
    on them.

    Policies, by what a query sees, itself among the recent keys:

    - "streaming": the first `sinks` keys and the last `recent` ones (StreamingLLM, Xiao et al. 2024, arXiv 2309.17453).
      With sinks=0 it is a sliding window.
    - "h2o": the last `recent` keys, and `heavy` others that got the most weight so far (H2O, Zhang et al. 2023, arXiv
      2306.14048): weights of each query over what it sees, added up; when there is one key too many, the one with the
      smallest sum goes, for good.
    - "observed": after a prompt of `prompt` tokens its `heavy` keys with the largest mean weight from the prompt's
      queries at and behind them, and all later keys. It is what kvpress calls ObservedAttentionPress.

    Heads that share keys drop the same ones, by the mean of their weights. The weights are those of the model that kept
    everything: what the loss in one layer does to the next is not in here. Memory grows with the length alone; with
    "h2o" the time is that of a loop over queries.

    Args:
        cap: one forward over whole sequences, whose patterns were kept. Of a generation, `cap.joined()`.
        sinks, heavy, recent, prompt: of the policies that have them; 4 sinks and 64 recent, 32 heavy and 32 recent, 64
            heavy ones by default.

    Raises:
        CaptureError: no causal self-attention in the capture, a map whose rows are no distributions, sequences that the
            policy leaves whole, or numbers that the policy has not.
    """
    expect(Capture, cap=cap)
    numbers = _numbers(policy, {"sinks": sinks, "heavy": heavy, "recent": recent, "prompt": prompt})
    chosen = [site for site in cap if site.site.kind == "self"]
    if not chosen:
        raise CaptureError("the capture has no self-attention, whose keys a cache would keep")
    leaves_of: Leaves = {
        "streaming": partial(_streaming, numbers["sinks"], numbers["recent"]),
        "h2o": partial(_h2o, numbers["heavy"], numbers["recent"]),
        "observed": partial(_observed, numbers["heavy"], numbers["prompt"]),
    }[policy]
    found = []
    for site in chosen:
        _check(site, chosen[0], policy, numbers)
        found.append(_of_site(site, leaves_of))
    heads = [(site.site, head) for site in chosen for head in range(site.shape[1])]
    lost, seen_by = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return Eviction(
        policy=policy, **numbers, layers=tuple(site.layer for site, _ in heads),
        numbers=tuple(head for _, head in heads), sites=tuple(site.name for site, _ in heads),
        lost=lost, seen_by=seen_by, provenance=cap.provenance,
    )  # fmt: skip


def _numbers(policy: str, given: dict[str, int | None]) -> dict[str, int]:
    """The numbers of a policy, 0 for those that it has not."""
    if policy not in list(_TAKES):
        raise CaptureError(f"there is no policy {policy!r}", hint=nearest(policy, list(_TAKES)))
    takes, found = _TAKES[policy], dict.fromkeys(given, 0)
    for name, value in given.items():
        if name not in takes:
            if value is not None:
                raise CaptureError(f'"{policy}" has no {name}', hint=f"it has {' and '.join(takes)}")
            continue
        usual, least = takes[name]
        value = usual if value is None else value
        if value is None or isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CaptureError(f'{name} of "{policy}" is a whole number from {least}, not {value!r}')
        found[name] = value
    return found


def _check(site: SiteCapture, first: SiteCapture, policy: str, numbers: dict[str, int]) -> None:
    """Raise a CaptureError unless the keys of a site are a cache that the policy makes smaller."""
    name, pattern, n = site.site.name, site.pattern, site.shape[2]
    if site.shape[2] != site.shape[3]:
        raise CaptureError(
            f"{site.shape[2]} queries see {site.shape[3]} keys: what was dropped before is not known", site=name,
            hint="capture the whole sequence, or take cap.joined() of a generation",
        )  # fmt: skip
    if site.shape[0::2] != first.shape[0::2]:
        raise CaptureError(f"the sites differ in examples or length: {list(site.shape)}", site=name, shape=first.shape)
    if pattern.signed or not (pattern.normalised or pattern.has_scores):
        raise CaptureError("rows of this map are no distributions over keys", site=name)
    for i in {0, n // 2, max(0, n - 2)}:
        if bool(pattern.rows(i)[..., i + 1 :].nan_to_num(0.0).any()):
            raise CaptureError("queries see later keys, of which there is no cache", site=name)
    most = numbers["prompt"] if policy == "observed" else numbers["sinks"] + numbers["heavy"] + numbers["recent"]
    if n <= most or (policy == "observed" and numbers["heavy"] >= numbers["prompt"]):
        raise CaptureError(
            f"with these numbers no query of {n} loses a key", site=name, hint="a longer sequence, or smaller numbers"
        )


def _of_site(site: SiteCapture, leaves_of: Leaves) -> tuple[Tensor, Tensor]:
    """[head, example, query] weight lost, and [head, example, key] how many queries see a key."""
    pattern, n = site.pattern, site.shape[2]
    n_kv_heads = site.site.n_kv_heads or pattern.n_kv_heads
    shared = pattern.n_heads // (n_kv_heads if pattern.n_heads % n_kv_heads == 0 else pattern.n_kv_heads)
    there = (pattern.seen.queries_per_key > 0).any(1).expand(pattern.n_batch, n)
    leaves = leaves_of(pattern, shared, there).masked_fill(~there[:, None], -1).repeat_interleave(shared, 1)
    lost = torch.zeros(*site.shape[:3], dtype=torch.float64, device=pattern.device)
    for rows, weights in _strips(pattern):
        i = torch.arange(rows.start, rows.stop, device=pattern.device)[:, None]
        gone = leaves[:, :, None, : rows.stop] <= i
        lost[:, :, rows] = weights.masked_fill(~gone, 0.0).sum(-1)
    lost = lost.masked_fill(~there[:, None], torch.nan)
    seen_by = (leaves - torch.arange(n, device=pattern.device)).masked_fill(~there[:, None], 0)
    return lost.transpose(0, 1), seen_by.transpose(0, 1)


def _strips(pattern: Pattern) -> Iterator[tuple[slice, Tensor]]:
    """Some queries at a time, and their weights [batch, head, query, key] on keys up to the last of them."""
    for start in range(0, pattern.n_queries, _STRIP):
        rows = slice(start, min(start + _STRIP, pattern.n_queries))
        yield rows, pattern.tile(rows, slice(0, rows.stop)).double().nan_to_num(0.0)


def _streaming(sinks: int, recent: int, pattern: Pattern, shared: int, there: Tensor) -> Tensor:
    """[batch, kv head, key] the first query that no longer sees the key; padding is not counted."""
    n, rank = pattern.n_keys, there.long().cumsum(-1) - 1
    found = torch.full((pattern.n_batch, n), n, device=pattern.device)
    for one, real in enumerate(there):
        at = real.nonzero()[:, 0]  # keys by their rank
        if len(at) > recent:
            found[one, at[: len(at) - recent]] = at[recent:]
    found = found.where(rank >= sinks, n)
    return found[:, None].expand(-1, pattern.n_heads // shared, -1)


def _h2o(heavy: int, recent: int, pattern: Pattern, shared: int, there: Tensor) -> Tensor:
    """As `_streaming`: one query after the other, the key that goes is the one with the smallest sum so far."""
    b, n, device = pattern.n_batch, pattern.n_keys, pattern.device
    kv = pattern.n_heads // shared
    sums = torch.zeros(b, kv, n, dtype=torch.float64, device=device)
    found = torch.full((b, kv, n), n, device=device)
    rank = there.long().cumsum(-1) - 1
    for rows, strip in _strips(pattern):
        for i in range(rows.start, rows.stop):
            seen = (found[..., : i + 1] == n) & there[:, None, : i + 1]
            over = (seen.sum(-1) > heavy + recent) & there[:, i, None]
            old = seen & (rank[:, i, None] - rank[:, : i + 1] >= recent)[:, None]
            goes = sums[..., : i + 1].masked_fill(~old, torch.inf).argmin(-1, keepdim=True)
            when = torch.where(over[..., None], i, found.gather(-1, goes))
            found.scatter_(-1, goes, when)
            seen = seen & (found[..., : i + 1] > i)
            weights = strip[:, :, i - rows.start, : i + 1] * seen.repeat_interleave(shared, 1)
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
            sums[..., : i + 1] += weights.unflatten(1, (kv, shared)).mean(2)
    return found


def _observed(heavy: int, prompt: int, pattern: Pattern, shared: int, there: Tensor) -> Tensor:
    """As `_streaming`: all keys of the prompt but the heaviest leave behind it."""
    n = pattern.n_keys
    sums = torch.zeros(pattern.n_batch, pattern.n_heads, n, dtype=torch.float64, device=pattern.device)
    for rows, weights in _strips(pattern):
        if rows.start < prompt:
            sums[..., : rows.stop] += weights[:, :, : prompt - rows.start].sum(2)
    later = there[:, :prompt].flip(-1).long().cumsum(-1).flip(-1)  # queries of the prompt, from the key's own on
    means = (sums[..., :prompt] / later.clamp(min=1)[:, None]).unflatten(1, (-1, shared)).mean(2)
    means = means.masked_fill(~there[:, None, :prompt], -torch.inf)
    found = torch.full((*means.shape[:2], n), n, device=pattern.device)
    found[..., :prompt] = prompt
    return found.scatter(-1, means.topk(heavy, dim=-1).indices, n)
