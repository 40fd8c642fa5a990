"""Attention pattern: queries down, keys across; cell by cell, or in blocks that keep every peak for long inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.capture.capture import Capture
from workbench.errors import CaptureError, ReportError, WorkbenchError
from workbench.hooks.sites import Site
from workbench.kernels.patterns import DensePattern, Pattern
from workbench.tokens import visible, visible_text
from workbench.views.attention_pattern import pyramid
from workbench.views.attention_pattern.pyramid import Pyramid
from workbench.views.base import scales
from workbench.views.base.registry import register
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View
from workbench.views.head_atlas import group_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXACT = 256  # up to so many tokens, cells of few heads are kept as they are
QUANTISED = 1024
IMAGE = 4096
_FEW_HEADS = 8
_CELLS_OF_FEW, _CELLS_OF_MANY = 9_000_000, 3_000_000  # cells of all maps that a page holds by default
_TILE = 512  # most tokens along an edge of a tile that a kernel computes
_ROWS_OF_TABLE = 1000


@dataclass(frozen=True)
class _Source:
    """One site to show: its pattern, or why there is none."""

    site: Site
    pattern: Pattern | None
    missing: str | None
    heads: list[int]
    shape: tuple[int, int, int, int]
    queries: list[str] | None
    keys: list[str] | None
    marks: str


class AttentionPattern(View):
    """See `attention_pattern`."""

    def __init__(
        self, spec: ViewSpec, selection: SharedSelection | None, sources: Sequence[_Source], batch: int
    ) -> None:
        super().__init__(spec, selection)
        self._sources, self._batch = sources, batch

    def answer(self, question: Mapping[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        """Cells of a part of a map, computed now: exact weights in float32, NaN where hidden."""
        if question.get("ask") != "tile":
            return super().answer(question)
        source = self._sources[int(question["site"])]
        if source.pattern is None:
            raise CaptureError("the pattern was not kept", site=source.site.name)
        (top, bottom), (left, right) = question["rows"], question["columns"]
        rows, columns = slice(int(top), int(bottom)), slice(int(left), int(right))
        inside = 0 <= rows.start < rows.stop <= source.shape[2] and 0 <= columns.start < columns.stop <= source.shape[3]
        if not inside or max(rows.stop - rows.start, columns.stop - columns.start) > _TILE:
            raise ReportError(f"there is no tile {rows.start}:{rows.stop}, {columns.start}:{columns.stop}")
        pattern = source.pattern.value_weighted() if question.get("variant") == "value-weighted" else source.pattern
        pattern = pattern.magnitude() if pattern.by_magnitude else pattern
        tile = pyramid.strip_of(pattern, self._batch, int(question["head"]), rows, columns)
        return {"shape": list(tile.shape)}, [tile.contiguous().numpy().tobytes()]

    def picture(self, figure: Figure) -> None:
        facts, blocks = self.spec.facts, self.spec.blocks
        i, head = facts["first"]
        site = facts["sites"][i]
        figure.set_size_inches(6.4, 5.6)
        axes = figure.add_subplot()
        if site["mode"] == "missing":
            axes.set_axis_off()
            axes.text(0, 0.5, visible_text(str(site["missing"]), 300), wrap=True)
            return
        cells = blocks[f"cells:0:{i}"][site["heads"].index(head)]
        weights = np.where(cells == 0, np.nan, pyramid.dequantise(cells))
        _, high = scales.limits(weights, signed=False)
        axes.set_facecolor(scales.unseen_colour())
        edges = (-0.5, site["keys"] - 0.5, site["queries"] - 0.5, -0.5)
        image = axes.imshow(
            np.sqrt(weights), vmin=0, vmax=np.sqrt(high), extent=edges, interpolation="nearest", aspect="auto"
        )
        axes.set(title=_name(site, head), xlabel="key", ylabel="query")
        for axis, which, n in ((axes.xaxis, "keyTokens", site["keys"]), (axes.yaxis, "queryTokens", site["queries"])):
            at = range(0, n, max(1, -(-n // 32)))
            tokens = None if site[which] is None else facts["tokens"][site[which]]
            names = [str(p) if tokens is None or n > EXACT else _short(tokens[p]) for p in at]
            axis.set_ticks(list(at), names, fontsize=7, rotation=90 if axis is axes.xaxis else 0)
        bar = figure.colorbar(
            image, label="weight, square-root scale" if site["weights"] == "normalised" else "|A| / Σ|A|"
        )
        places = np.linspace(0, np.sqrt(high), 5).tolist()
        bar.set_ticks(places, labels=[f"{p * p:.2g}" for p in places])


def attention_pattern(
    source: Capture | Pattern | torch.Tensor,
    site: str | int | Site | None = None,
    heads: Sequence[int] | None = None,
    *,
    batch: int = 0,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    value_weighted: bool = False,
    budget: int | None = None,
    n_top: int = 8,
    title: str | None = None,
    caption: str | None = None,
    selection: SharedSelection | None = None,
) -> AttentionPattern:
    """What each query looks at, for one head or for all heads of a capture.

    Up to 256 tokens the cells of a few heads are exact; up to 4096 they are kept in 8 bits, with exact largest weights
    per row; beyond, and where many heads share the budget, a cell is the largest weight in a block of tokens and names
    the query and key it belongs to. In a notebook finer tiles are computed on demand. The view says which it is, and
    the largest error.

    Args:
        source: a capture of one forward, a pattern, or weights [query, key] or [head, query, key].
        site, heads: which to show; all if None.
        tokens, key_tokens: texts of queries and keys, where the source does not know them; keys have the queries' if
            they are as many.
        value_weighted: add p·‖v‖, renormalised per row, to choose instead of p; needs captured values.
        budget: most cells of all maps together; blocks grow until they fit.
        n_top: exact largest weights that are kept per row.

    Raises:
        ReportError: nothing to show, no such batch entry, weights that are NaN or no shares.
        CaptureError: no such site or head, or several forwards: choose one of `cap.calls`.

    >>> attention_pattern(torch.eye(3), tokens=["a", "b", "c"])
    AttentionPattern(Attention pattern)
    """
    sources = list(_sources(source, site, heads, batch, tokens, key_tokens))
    found = [each for each in sources if each.pattern is not None]
    variants = ["raw", "value-weighted"] if value_weighted else ["raw"]
    n_heads = sum(len(each.heads) for each in found) * len(variants)
    budget = (_CELLS_OF_FEW if n_heads <= _FEW_HEADS else _CELLS_OF_MANY) if budget is None else budget
    block, n_top = _block(found, budget / len(variants)), _affordable_top(found, n_top, budget / len(variants))
    lists = _Lists()
    facts: list[dict[str, Any]] = []
    blocks: dict[str, Any] = {}
    shown: list[tuple[_Source, Pyramid]] = []
    for i, each in enumerate(sources):
        missing, made = each.missing, None
        exact = block == 1 and n_heads <= _FEW_HEADS and max(each.shape[2:]) <= EXACT
        if each.pattern is not None:
            try:
                for v, variant in enumerate(variants):
                    pattern = each.pattern if variant == "raw" else each.pattern.value_weighted()
                    made = pyramid.build(pattern, each.heads, batch, block=block, n_top=n_top, exact=exact)
                    blocks |= {f"{name}:{v}:{i}": array for name, array in _arrays(made).items()}
                    if v == 0:
                        shown.append((each, made))
            except CaptureError as error:
                missing, made = str(error), None
                blocks = {name: array for name, array in blocks.items() if not name.endswith(f":{i}")}
        facts.append(_site_facts(each, made, missing, lists))
    if not shown:
        raise ReportError(f"no pattern was kept: {facts[0]['missing']}", hint="capture with queries_keys=True")
    first = next(i for i, each in enumerate(facts) if each["mode"] != "missing")
    leading = facts[first]
    spec = ViewSpec(
        kind="attention_pattern",
        title=title or "Attention pattern",
        caption=caption or _caption(facts),
        facts={"tokens": lists.rows, "variants": variants, "sites": facts, "first": [first, leading["heads"][0]]},
        blocks=blocks,
        table=_table(shown, lists.rows),
        left_out=max(0, sum(int((made.top_keys >= 0).sum()) for _, made in shown) - _ROWS_OF_TABLE),
        notes=tuple(_notes(facts, shown, n_top)),
        provenance=dict(source.provenance) if isinstance(source, Capture) else {},
    )
    return AttentionPattern(spec, selection, sources, batch)


class _Lists:
    """Lists of visible tokens, each kept once: most sites of a model share theirs."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []

    def index(self, tokens: Sequence[str] | None) -> int | None:
        if tokens is None:
            return None
        shown = [visible(token) for token in tokens]
        if shown not in self.rows:
            self.rows.append(shown)
        return self.rows.index(shown)


def _sources(
    source: Any, site: Any, heads: Sequence[int] | None, batch: int, tokens: Any, key_tokens: Any
) -> Iterator[_Source]:
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
        source = DensePattern(weights.float(), normalised=normalised)
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
) -> _Source:
    _entry(batch, shape[0])
    if 0 in shape:
        raise ReportError("there are no weights to show", site=site.name or None, shape=shape)
    which = list(site.here or range(shape[1])) if heads is None else list(heads)
    bad = [head for head in which if not 0 <= head < shape[1]]
    if bad or not which:
        raise CaptureError(
            f"there are {shape[1]} heads, no head {bad[0] if bad else '(none given)'}", site=site.name or None
        )
    return _Source(site, pattern, missing, which, tuple(shape), queries, keys, marks)


def _cells(source: _Source, block: int) -> float:
    """Cells of a site's maps that cost something: half of a causal map deflates to nothing."""
    _, _, queries, keys = source.shape
    half = 0.5 if source.pattern is not None and source.pattern.mask.causal and queries == keys else 1.0
    return len(source.heads) * -(-queries // block) * -(-keys // block) * half


def _block(sources: Sequence[_Source], budget: float) -> int:
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


def _affordable_top(sources: Sequence[_Source], n_top: int, budget: float) -> int:
    rows = sum(len(each.heads) * each.shape[2] for each in sources)
    return next((n for n in (n_top, 4, 2, 1) if n <= n_top and 8 * n * rows <= max(budget, 2_500_000)), 0)


def _arrays(made: Pyramid) -> dict[str, Any]:
    arrays = {"cells": made.cells, "top_keys": made.top_keys, "top": made.top, "first": made.first}
    if made.places is not None:
        arrays["places"] = made.places
    if made.exact is not None:
        arrays["exact"] = made.exact
    return arrays


def _site_facts(source: _Source, made: Pyramid | None, missing: str | None, lists: _Lists) -> dict[str, Any]:
    longest = max(source.shape[2:])
    mode = "missing" if made is None else "pyramid"
    if made is not None and made.block == 1:
        mode = "exact" if made.exact is not None else "quantised" if longest <= QUANTISED else "image"
    return {
        "name": visible(source.site.name) if source.site.name else None,
        "label": group_label(source.site) if source.site.name else "Pattern",
        "layer": int(source.site.layer),
        "heads": source.heads,
        "queries": source.shape[2],
        "keys": source.shape[3],
        "queryTokens": lists.index(source.queries),
        "keyTokens": lists.index(source.keys),
        "weights": source.marks,
        "mode": mode,
        "block": 1 if made is None else made.block,
        "error": 0.0 if made is None else float(f"{made.error:.2g}"),
        "firstKey": 0 if made is None else made.first_key,
        "missing": None if missing is None else visible_text(missing),
    }


def _name(site: dict[str, Any], head: int) -> str:
    return f"L{site['layer']}H{head}, {site['name']}" if site["name"] else f"Head {head}"


def _short(token: str) -> str:
    return token if len(token) <= 12 else token[:11] + "…"


def _caption(facts: Sequence[dict[str, Any]]) -> str:
    heads = sum(len(site["heads"]) for site in facts if site["mode"] != "missing")
    sizes = {(site["queries"], site["keys"]) for site in facts}
    size = f"{min(sizes)[0]:,} queries and {min(sizes)[1]:,} keys" if len(sizes) == 1 else "sites of several sizes"
    return f"{heads:,} head{'' if heads == 1 else 's'} over {size}: a row is what its query looks at."


def _notes(facts: Sequence[dict[str, Any]], shown: Any, n_top: int) -> Iterator[str]:
    block = max(site["block"] for site in facts)
    error = max(site["error"] for site in facts)
    modes = {site["mode"] for site in facts}
    if block > 1:
        yield (
            f"Pooled: a cell is the largest weight in a block of {block} × {block} tokens and names its query and key; "
            f"in 8 bits, off by at most {error}."
        )
    elif modes <= {"exact", "missing"}:
        yield "Cell by cell, exact; the colours have 254 levels."
    else:
        yield f"Cell by cell, in 8 bits: off by at most {error}."
    yield (
        f"The {n_top} largest weights of each row are exact."
        if n_top
        else "No exact weights are kept for so many rows."
    )
    marks = sorted({site["weights"] for site in facts} - {"normalised"})
    if marks:
        yield f"Where a head's weights are {' or '.join(marks)}, |A| / Σ|A| is shown per row."
    lost = [site["name"] or "" for site in facts if site["mode"] == "missing"]
    if lost:
        yield f"No pattern: {', '.join(lost[:4])}{' …' if len(lost) > 4 else ''}. {facts[-1]['missing'] or ''}"


def _table(shown: Sequence[tuple[_Source, Pyramid]], lists: list[list[str]]) -> dict[str, Any]:
    """The largest exact weights of all heads that are shown."""
    parts = []
    for i, (source, made) in enumerate(shown):
        head, query, rank = np.nonzero(made.top_keys >= 0)
        weight = made.top[head, query, rank]
        best = np.argsort(-weight, kind="stable")[:_ROWS_OF_TABLE]
        where = np.full(len(best), i), np.asarray(source.heads)[head[best]], query[best]
        parts.append(np.stack([*where, made.top_keys[head, query, rank][best], weight[best]]))
    every = np.concatenate(parts, axis=1)
    every = every[:, np.argsort(-every[4], kind="stable")[:_ROWS_OF_TABLE]]
    at, head, query, key = every[:4].astype(np.int32)

    def text(axis: str, positions: Any) -> list[str]:
        found = []
        for i, position in zip(at, positions, strict=True):
            tokens = getattr(shown[i][0], axis)
            found.append("" if tokens is None else visible(tokens[position]))
        return found

    table: dict[str, Any] = {}
    if any(source.site.name for source, _ in shown):
        table["site"] = [visible(shown[i][0].site.name) for i in at]
        table["layer"] = np.array([shown[i][0].site.layer for i in at], np.int32)
    table |= {"head": head, "query": query}
    if any(source.queries is not None for source, _ in shown):
        table["query token"] = text("queries", query)
    table["key"] = key
    if any(source.keys is not None for source, _ in shown):
        table["key token"] = text("keys", key)
    table["weight"] = every[4].astype(np.float64)
    return table


register(Pattern, attention_pattern)
