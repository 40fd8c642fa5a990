"""What a playground shows of a run, as data: heads with their numbers, one head's pattern, what is said next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workbench.analysis.profile.measuring import labels_of
from workbench.capture.capture import Capture
from workbench.counting import count
from workbench.errors import CaptureError, ReportError, WorkbenchError
from workbench.hooks.sites import Site
from workbench.tokens import piece, visible, visible_text
from workbench.views.attention_pattern import pyramid
from workbench.views.base.selection import Selection
from workbench.views.base.spec import Array, ViewSpec
from workbench.views.head_atlas import group_label, head_atlas
from workbench.views.head_gallery.of_capture import pooled
from workbench.views.playground.edits import Ablated
from workbench.views.playground.running import Ran, divergence, leading, log_odds

ROWS = 10
"""The likeliest tokens before, and as many of those after, that are listed."""
_PROMPT = 160  # characters of it in the caption
_METHOD = (
    "A head that is ablated gives zero; a row gives zero at its query; a cut edge is a weight taken out of its row{}. "
    "Log-odds are ln p / (1 − p)."
)
_MAPS = (
    "Patterns are kept in 8 bits after a square root, off by at most 0.004, and shown as queries and keys make them: "
    "edits of rows and edges are marked in them."
)


def sites_of(capture: Capture) -> list[Site]:
    """The sites in the order in which an atlas has them."""
    sites = [one.site for one in capture]
    labels = dict.fromkeys(map(group_label, sites))
    return [site for label in labels for site in sites if group_label(site) == label]


def heads_of(capture: Capture) -> list[tuple[Site, int]]:
    """All heads, site by site."""
    return [(site, head) for site in sites_of(capture) for head in range(capture[site.name].shape[1])]


def head_at(ran: Ran, chosen: Selection) -> int:
    """Which head is chosen; if none of these is, the one that was ablated last, else the first one."""
    heads = heads_of(ran.before)
    found = (
        i
        for i, (site, head) in enumerate(heads)
        if chosen.heads[:1] == (head,) and chosen.has(site.layer, head, visible(site.name))
    )
    edited = [(site.path, head) for site, head in heads]
    last = next(((edit.site, edit.head) for edit in reversed(ran.edits)), edited[0])
    return next(found, edited.index(last))


def tokens_of(ran: Ran) -> list[str]:
    """The tokens of the prompt, and of what was written, as they are shown."""
    streams = ran.before.forwards[0].tokens
    return [visible(token) for name in sorted(streams) for token in streams[name][0]]


def check_there(edit: Ablated, capture: Capture) -> None:
    """Refuse an edit that the forward of a capture has no place for.

    Raises:
        WorkbenchError: no such head or position, or a key that the query does not see.
    """
    record = capture[edit.site]
    _, heads, queries, keys = record.shape
    for what, at, n in (("head", edit.head, heads), ("query", edit.query, queries), ("key", edit.key, keys)):
        if at is not None and not 0 <= at < n:
            raise ReportError(f"there is no {what} {at}: there are {n}, 0 to {n - 1}", site=edit.site)
    if edit.key is not None and np.isnan(weight_of(edit, capture)):
        raise ReportError(f"query {edit.query} does not see key {edit.key}", site=edit.site)


def weight_of(edit: Ablated, capture: Capture) -> float:
    """The weight of an edge, of |A| per row where a pattern is signed; NaN where the query does not see the key.

    Raises:
        WorkbenchError: the pattern is not known, or holds what is no number.
    """
    assert edit.query is not None
    assert edit.key is not None
    pattern = capture[edit.site].pattern
    pattern = pattern.magnitude() if pattern.by_magnitude else pattern
    row = slice(edit.query, edit.query + 1), slice(0, pattern.n_keys)
    return float(pyramid.strip_of(pattern, 0, edit.head, *row)[0, edit.key])


def cells_of(ran: Ran, at: Any, *, after: bool) -> Array:
    """[query, key] bytes of a head's pattern, by its number among all heads; see `attention_pattern.pyramid`.

    Raises:
        WorkbenchError: no such head, or its pattern is not known.
    """
    capture = ran.after if after else ran.before
    heads = heads_of(capture)
    if type(at) is not int or not 0 <= at < len(heads):
        raise ReportError(f"there is no head of number {at!r}")
    site, head = heads[at]
    record = capture[site.name]
    if record.shape[0] != 1:
        raise CaptureError("the site reads the prompt in windows", site=site.name)
    (cells,), (broken,) = pooled(record.pattern, [head], 0, 1)
    if broken:
        raise ReportError("the pattern holds weights that are not numbers", site=site.name)
    return np.asarray(cells)


def spec_of(
    ran: Ran,
    chosen: Selection,
    dropped: Sequence[Ablated],
    *,
    title: str,
    provenance: Mapping[str, Any],
    inputs: str,
) -> ViewSpec:
    """The spec of a run, with the pattern of the chosen head."""
    before = head_atlas(ran.before, provenance={}).spec
    after = head_atlas(ran.after, provenance={}).spec if ran.edits else before
    sites = sites_of(ran.before)
    lists: list[list[str]] = []
    maps = [_map_of(site, ran.before, lists) for site in sites]
    labels = dict(zip(heads_of(ran.before), labels_of(heads_of(ran.before)), strict=True))
    named = {site.path: (i, site) for i, site in reversed(list(enumerate(sites)))}

    def words(edit: Ablated) -> str:
        return visible(labels[named[edit.site][1], edit.head]) + edit.where

    places, numbers = _places(ran)
    kept = head_at(ran, chosen)
    return ViewSpec(
        kind="playground",
        title=title,
        caption=_caption(ran, provenance),
        facts={
            "prompt": _sendable(ran.prompt),
            "written": _sendable(ran.written),
            "decodes": ran.decodes,
            "renormalise": ran.renormalise,
            "tokens": [[visible(token) for token in row] for row in lists],
            "groups": before.facts["groups"],
            "metrics": before.facts["metrics"],
            "maps": maps,
            "edits": [
                {
                    "site": named[edit.site][0],
                    "head": edit.head,
                    "query": edit.query,
                    "key": edit.key,
                    "label": visible(labels[named[edit.site][1], edit.head]),
                    "weight": None if edit.key is None else weight_of(edit, ran.before),
                }
                for edit in ran.edits
            ],
            "dropped": [words(edit) for edit in dropped],
            "places": places,
            "kept": kept,
        },
        blocks={
            "values": np.stack([before.blocks["values"], after.blocks["values"]]),
            "next": numbers,
            "divergence": np.array([divergence(pair) for pair in ran.said]),
            **_cells(ran, kept),
        },
        table=_table(ran, places, numbers),
        notes=_notes(ran, list(map(words, dropped))),
        provenance=provenance,
        inputs=inputs,
    )


def _sendable(text: str) -> str:
    """The text as a browser can be sent it: halves of surrogate pairs are no characters."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _map_of(site: Site, capture: Capture, lists: list[list[str]]) -> dict[str, Any]:
    record = capture[site.name]
    missing = None
    try:
        _ = record.pattern
    except WorkbenchError as error:
        missing = visible_text(error.message)

    def index(rows: list[list[str]] | None) -> int | None:
        if rows is None:
            return None
        if rows[0] not in lists:
            lists.append(rows[0])
        return lists.index(rows[0])

    return {
        "queries": record.shape[2],
        "keys": record.shape[3],
        "queryTokens": index(capture.query_tokens(site.name)),
        "keyTokens": index(capture.key_tokens(site.name)),
        "missing": missing,
    }


def _cells(ran: Ran, at: int) -> dict[str, Array]:
    """The chosen head's patterns before and after, where they are known."""
    try:
        return {f"cells:{i}": cells_of(ran, at, after=bool(i)) for i in (0, 1)}
    except WorkbenchError:
        return {}  # the view asks, and is told why


def _places(ran: Ran) -> tuple[list[dict[str, Any]], Array]:
    """For each place its tokens, and [place, row, 3]: probability before and after, difference of log-odds."""
    tokenizer = ran.tokenizer
    rows = [leading(pair, ROWS) for pair in ran.said]
    numbers = np.full((len(rows), max(1, *map(len, rows)), 3), np.nan)
    places = []
    streams = ran.before.forwards[0].tokens
    stream = streams.get("decoder" if ran.decodes else "input")
    for i, (at, tokens, pair) in enumerate(zip(ran.places, rows, ran.said, strict=True)):
        if tokens:
            before, after = pair
            numbers[i, : len(tokens), 0] = before.log_probabilities[tokens].exp()
            numbers[i, : len(tokens), 1] = after.log_probabilities[tokens].exp()
            if ran.edits:
                numbers[i, : len(tokens), 2] = log_odds(after, tokens) - log_odds(before, tokens)
            else:
                numbers[i, : len(tokens), 2] = 0.0
        places.append(
            {
                "position": at,
                "token": None if stream is None else visible(stream[0][at]),
                "tokens": [visible(piece(tokenizer, token)) for token in tokens],
                "ids": tokens,
                "wrong": [said.wrong for said in pair],
            }
        )
    return places, numbers


def _table(ran: Ran, places: Sequence[Mapping[str, Any]], numbers: Array) -> dict[str, Any]:
    at = [(i, row) for i, place in enumerate(places) for row in range(len(place["ids"]))]
    columns = {
        name: np.array([numbers[i, row, j] for i, row in at])
        for j, name in enumerate(("before", "after", "log-odds difference"))
    }
    position = np.array([places[i]["position"] for i, _ in at], np.int32)
    return {
        **({"position": position} if len(places) > 1 else {}),
        "token": [places[i]["tokens"][row] for i, row in at],
        "id": np.array([places[i]["ids"][row] for i, row in at], np.int32),
        "before": columns["before"],
        "after": columns["after"],
        "difference": columns["after"] - columns["before"],
        "log-odds difference": columns["log-odds difference"],
    }


def _caption(ran: Ran, provenance: Mapping[str, Any]) -> str:
    model = provenance.get("model_name", "the model")
    text = " ".join(ran.prompt.split())
    shown = text if len(text) <= _PROMPT else f"{text[: _PROMPT // 2]} … {text[-_PROMPT // 2 :]}"
    where = "at the masks of" if ran.masked else "after"
    edits = f", as it is and with {count(len(ran.edits), 'ablation')}" if ran.edits else ""
    return f"What {visible_text(model)} says {where} “{visible_text(shown)}”{edits}."


def _notes(ran: Ran, dropped: Sequence[str]) -> tuple[str, ...]:
    notes = [_METHOD.format(", which goes to the others in proportion" if ran.renormalise else ""), _MAPS]
    if dropped:
        notes.append(f"This prompt has no place for what was ablated before: {'; '.join(dropped)}.")
    if any(site.n_calls > 1 for site in ran.before):
        notes.append("A site that is called several times is ablated at each call.")
    lost = list(dict.fromkeys([*ran.before.silent, *ran.before.unrecorded, *(u.name for u in ran.before.sites.unread)]))
    if lost:
        some = ", ".join(map(visible, lost[:4])) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        notes.append(f"Not among the heads, since they did not run or cannot be shown: {some}.")
    return tuple(notes)
