"""Attention pattern: queries down, keys across; cell by cell, or in blocks that keep every peak for long inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.capture.capture import Capture
from workbench.counting import count
from workbench.errors import CaptureError, ReportError
from workbench.hooks.sites import Site
from workbench.kernels.patterns import Pattern
from workbench.kernels.recurrent import RecurrentPattern
from workbench.tokens import visible, visible_text
from workbench.views.attention_pattern import pyramid
from workbench.views.attention_pattern.picture import draw
from workbench.views.attention_pattern.pyramid import Pyramid
from workbench.views.attention_pattern.sources import (
    EXACT,
    QUANTISED,
    Source,
    affordable_top,
    block_for,
    of_batch,
    sources_of,
)
from workbench.views.base.registry import register
from workbench.views.base.selection import SharedSelection, inputs_of
from workbench.views.base.spec import Array, ViewSpec
from workbench.views.base.view import View
from workbench.views.head_atlas import group_label
from workbench.views.head_atlas.leading import Leading, hardest, leading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW_HEADS = 8
_CELLS_OF_FEW, _CELLS_OF_MANY = 9_000_000, 3_000_000  # cells of all maps that a page holds by default
_TILE = 512  # most tokens along an edge of a tile that a kernel computes
_ROWS_OF_TABLE = 1000


class AttentionPattern(View):
    """See `attention_pattern`."""

    def __init__(
        self, spec: ViewSpec, selection: SharedSelection | None, sources: Sequence[Source], batch: int
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
        pattern = variant_of(source.pattern, str(question.get("variant")))
        pattern = pattern.magnitude() if pattern.by_magnitude else pattern
        tile = pyramid.strip_of(pattern, self._batch, int(question["head"]), rows, columns)
        return {"shape": list(tile.shape)}, [tile.contiguous().numpy().tobytes()]

    def picture(self, figure: Figure) -> None:
        draw(figure, self.spec, self.chosen)


def attention_pattern(
    source: Capture | Pattern | torch.Tensor,
    site: str | int | Site | None = None,
    heads: Sequence[int] | None = None,
    *,
    batch: int = 0,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    value_weighted: bool = False,
    apart: bool = False,
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
        apart: of linear and recurrent layers alone, and add what content (queries and keys, without decay) and decay
            (without queries and keys) make of a row each by itself.
        budget: most cells of all maps together; blocks grow until they fit.
        n_top: exact largest weights that are kept per row.

    Raises:
        ReportError: nothing to show, no such batch entry, weights that are NaN or no shares; no recurrence among them
            whose parts could be told apart.
        CaptureError: no such site or head, or several forwards: choose one of `cap.calls`.

    >>> attention_pattern(torch.eye(3), tokens=["a", "b", "c"])
    AttentionPattern(Attention pattern)
    """
    sources = list(sources_of(source, site, heads, batch, tokens, key_tokens))
    if apart:
        sources = _recurrences(sources)
    found = [each for each in sources if each.pattern is not None]
    variants = ["raw", *(["value-weighted"] if value_weighted else []), *(["content", "decay"] if apart else [])]
    n_heads = sum(len(each.heads) for each in found) * len(variants)
    budget = (_CELLS_OF_FEW if n_heads <= _FEW_HEADS else _CELLS_OF_MANY) if budget is None else budget
    block, n_top = block_for(found, budget / len(variants)), affordable_top(found, n_top, budget / len(variants))
    lists = _Lists()
    facts: list[dict[str, Any]] = []
    blocks: dict[str, Any] = {}
    shown: list[tuple[Source, Pyramid]] = []
    for i, each in enumerate(sources):
        missing, made = each.missing, None
        exact = block == 1 and n_heads <= _FEW_HEADS and max(each.shape[2:]) <= EXACT
        if each.pattern is not None:
            try:
                for v, variant in enumerate(variants):
                    pattern = variant_of(each.pattern, variant)
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
    begins = _begins(source, shown)
    spec = ViewSpec(
        kind="attention_pattern",
        title=title or "Attention pattern",
        caption=caption or _caption(facts) + ("" if begins is None else f" {begins.why}"),
        facts={"tokens": lists.rows, "variants": variants, "sites": facts, "first": [first, facts[first]["heads"][0]]},
        blocks=blocks,
        table=_table(shown, lists.rows),
        left_out=max(0, sum(int((made.top_keys >= 0).sum()) for _, made in shown) - _ROWS_OF_TABLE),
        notes=(*of_batch(shown[0][0].shape[0], batch), *_notes(facts, shown, n_top)),
        selection={} if begins is None else begins.selection,
        provenance=dict(source.provenance) if isinstance(source, Capture) else {},
        inputs=inputs_of(lists.rows[0]) if lists.rows else None,
    )
    return AttentionPattern(spec, selection, sources, batch)


def _begins(source: Any, shown: Sequence[tuple[Source, Pyramid]]) -> Leading | None:
    """The head of a capture to begin with: by its statistics, else by the largest weights of the rows."""
    if not isinstance(source, Capture):
        return None
    heads = [(each.site, head) for each, _ in shown for head in each.heads]
    if len(heads) < 2:
        return None
    return leading(source, heads) or hardest(heads, np.concatenate([_alone(*each) for each in shown]))


def _alone(source: Source, made: Pyramid) -> Array:
    """[head] the mean of rows' largest weights, which count as 0 on the first key and on a row's own."""
    if not made.top.shape[-1]:
        return np.full(len(source.heads), np.nan)
    queries, keys = source.shape[2:]
    key, weight = made.top_keys[..., 0], made.top[..., 0]  # [head, query]
    elsewhere = (key >= 0) & (key != made.first_key) & (key != np.arange(queries) + keys - queries)
    return np.asarray(np.where(elsewhere, weight, 0.0).mean(1), np.float64)


def variant_of(pattern: Pattern, variant: str) -> Pattern:
    """The pattern as one of the variants that the view offers."""
    if variant == "value-weighted":
        return pattern.value_weighted()
    whole = pattern.as_recurrence() if variant in ("content", "decay") else None
    if not isinstance(whole, RecurrentPattern):
        return pattern
    return whole.content() if variant == "content" else whole.decay()


def _recurrences(sources: Sequence[Source]) -> list[Source]:
    """Those whose maps are of a recurrence with a decay."""
    found = []
    for each in sources:
        whole = None if each.pattern is None else each.pattern.as_recurrence()
        if isinstance(whole, RecurrentPattern) and whole.log_decay is not None:
            found.append(each)
    if not found:
        raise ReportError(
            "no map here is that of a recurrence with a decay",
            hint="capture a model with linear or recurrent layers, with queries_keys=True",
        )
    return found


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


def _arrays(made: Pyramid) -> dict[str, Any]:
    arrays = {"cells": made.cells, "top_keys": made.top_keys, "top": made.top, "first": made.first}
    if made.places is not None:
        arrays["places"] = made.places
    if made.exact is not None:
        arrays["exact"] = made.exact
    return arrays


def _site_facts(source: Source, made: Pyramid | None, missing: str | None, lists: _Lists) -> dict[str, Any]:
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


def _caption(facts: Sequence[dict[str, Any]]) -> str:
    heads = sum(len(site["heads"]) for site in facts if site["mode"] != "missing")
    sizes = {(site["queries"], site["keys"]) for site in facts}
    size = f"{min(sizes)[0]:,} queries and {min(sizes)[1]:,} keys" if len(sizes) == 1 else "sites of several sizes"
    return f"{count(heads, 'head')} over {size}: a row is what its query looks at."


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


def _table(shown: Sequence[tuple[Source, Pyramid]], lists: list[list[str]]) -> dict[str, Any]:
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
