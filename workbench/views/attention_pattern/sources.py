"""What an attention pattern is made of: sites of a capture, a pattern or a tensor; and how small they must become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workbench.capture.capture import Capture
from workbench.errors import CaptureError, ReportError, WorkbenchError
from workbench.hooks.sites import Site
from workbench.kernels.patterns import DensePattern, Pattern
from workbench.views.attention_pattern import pyramid

EXACT = 256  # up to so many tokens, cells of few heads are kept as they are
QUANTISED = 1024
IMAGE = 4096


@dataclass(frozen=True)
class Source:
    """One site to show: its pattern, or why there is none."""

    site: Site
    pattern: Pattern | None
    missing: str | None
    heads: list[int]
    shape: tuple[int, int, int, int]
    queries: list[str] | None
    keys: list[str] | None
    marks: str


def sources_of(
    source: Any, site: Any, heads: Sequence[int] | None, batch: int, tokens: Any, key_tokens: Any
) -> Iterator[Source]:
    """The sites of a source.

    Raises:
        ReportError: nothing to show, no such batch entry. CaptureError: no such site or head.
    """
    if isinstance(source, Capture):
        if not len(source.calls) or not len(source.sites):
            raise ReportError("the capture is empty", hint="call the model inside `with wb.capture() as cap:`")
        chosen = list(source.sites) if site is None else [source[site].site]
        for each in chosen:
            record = source[each.name]
            try:
                pattern, missing = record.pattern, None
            except WorkbenchError as error:
                pattern, missing = None, str(error)
            known = source.query_tokens(each.name), source.key_tokens(each.name)
            texts = [None if rows is None else list(rows[_entry(batch, record.shape[0])]) for rows in known]
            yield _made(each, pattern, missing, heads, record.shape, texts[0], texts[1], record.marks, batch)
        return
    if isinstance(source, torch.Tensor):
        weights = source.detach()
        if weights.dim() not in (2, 3, 4):
            raise ReportError("weights are [query, key] or [head, query, key]", shape=weights.shape)
        if 0 in weights.shape:
            raise ReportError("there are no weights to show", shape=weights.shape)
        weights = weights.reshape(-1, *weights.shape[-3:]) if weights.dim() > 2 else weights[None, None]
        normalised = bool(torch.allclose(weights.double().sum(-1), torch.ones((), dtype=torch.float64), atol=1e-3))
        source = DensePattern.of(weights.float(), normalised=normalised)
    if not isinstance(source, Pattern):
        raise ReportError(f"a {type(source).__name__} has no pattern", hint="pass a capture, a pattern or a tensor")
    for name, texts, n in (("tokens", tokens, source.n_queries), ("key_tokens", key_tokens, source.n_keys)):
        if texts is not None and len(texts) != n:
            raise ReportError(f"there are {len(texts)} {name} for {n} positions")
    if key_tokens is None and source.n_keys == source.n_queries:
        key_tokens = tokens
    marks = "signed" if source.signed else "normalised" if source.normalised else "unnormalised"
    one = Site("", 0, "self", source.n_heads, None, None)
    yield _made(one, source, None, heads, source.shape, tokens, key_tokens, marks, batch)


def of_batch(n: int, batch: int) -> list[str]:
    """Which entry of a batch is shown, where there are several."""
    return [f"Entry {batch} of a batch of {n:,} is shown; batch= chooses another."] if n > 1 else []


def _entry(batch: int, n: int) -> int:
    if not 0 <= batch < n:
        raise ReportError(f"there are batch entries 0 to {n - 1}, no entry {batch}")
    return batch


def _made(
    site: Site,
    pattern: Pattern | None,
    missing: str | None,
    heads: Any,
    shape: Any,
    queries: Any,
    keys: Any,
    marks: str,
    batch: int,
) -> Source:
    _entry(batch, shape[0])
    if 0 in shape:
        raise ReportError("there are no weights to show", site=site.name or None, shape=shape)
    which = list(site.here or range(shape[1])) if heads is None else list(heads)
    bad = [head for head in which if not 0 <= head < shape[1]]
    if bad or not which:
        raise CaptureError(
            f"there are {shape[1]} heads, no head {bad[0] if bad else '(none given)'}", site=site.name or None
        )
    return Source(site, pattern, missing, which, tuple(shape), queries, keys, marks)


def _cells(source: Source, block: int) -> float:
    """Cells of a site's maps that cost something: half of a causal map deflates to nothing."""
    _, _, queries, keys = source.shape
    half = 0.5 if source.pattern is not None and source.pattern.mask.causal and queries == keys else 1.0
    return len(source.heads) * -(-queries // block) * -(-keys // block) * half


def block_for(sources: Sequence[Source], budget: float) -> int:
    """Edge of the smallest blocks, a power of two, in which the maps of all sites have so many cells.

    Raises:
        ReportError: the largest blocks are too small.
    """
    block = 1
    while sum(_cells(each, block) for each in sources) > budget or any(
        max(s.shape[2:]) > IMAGE * block for s in sources
    ):
        block *= 2
        if block > pyramid.MOST_BLOCK:
            asked = sum(_cells(each, pyramid.MOST_BLOCK) for each in sources)
            raise ReportError(
                f"in blocks of {pyramid.MOST_BLOCK} tokens the maps still have {asked:,.0f} cells of {budget:,.0f}",
                hint="show fewer sites or heads, or pass a larger budget=",
            )
    # Three bytes a cell, and no eye sees more: long maps come down to what a screen can show.
    while any(max(s.shape[2:]) > IMAGE and max(s.shape[2:]) > QUANTISED * block for s in sources):
        block *= 2
    return min(block, pyramid.MOST_BLOCK)


def affordable_top(sources: Sequence[Source], n_top: int, budget: float) -> int:
    """How many exact weights per row are worth their room, at most `n_top`."""
    rows = sum(len(each.heads) * each.shape[2] for each in sources)
    return next((n for n in (n_top, 4, 2, 1) if n <= n_top and 8 * n * rows <= max(budget, 2_500_000)), 0)
