"""What each head does in a batch of windows: scores, entropies, distances, and its strongest look."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.capture.site_capture import SiteCapture
from workbench.errors import CaptureError

SCORES = ("induction", "previous", "duplicate", "sink", "retrieval", "streaming")
MEANINGS = {
    "induction": "mean weight on what followed an earlier copy of the query's token, over queries that have one",
    "previous": "mean weight on the position before",
    "duplicate": "mean weight on earlier copies of the query's token, over queries that have one",
    "sink": "mean weight on the first key",
    "retrieval": "how often the largest weight is on a copy of the next token, where there is one",
    "streaming": "weight that is left with the first and the most recent keys alone",
    "copying": "Σλ / Σ|λ| of embedding, OV and unembedding: 1 if all eigenvalues copy, −1 if all do the opposite",
}
TOTALS = ("current", "entropy", "distance", "squared distance")
STATISTICS = (
    "entropy", "distance", "distance_var", "induction", "previous", "current", "sink", "peak", "peak_key",
)  # fmt: skip
_STRIP = 64  # queries at a time


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch of windows each score is a mean over.

    Attributes:
        ids: [batch, position]. text: the positions of the text itself.
        asked: [score, batch, query] bool.
        known: [batch, position] bool: text that the tokenizer has tokens for.
        copies: [batch, query, key] bool: an earlier copy of the query's token, if that is a known one.
        next_ids: [batch, query] the token that follows.
    """

    ids: Tensor
    text: slice
    sinks: int
    recent: int
    asked: Tensor
    known: Tensor
    copies: Tensor
    next_ids: Tensor

    @classmethod
    def of(cls, ids: Tensor, text: slice, sinks: int, recent: int, unknown: int | None = None) -> Rows:
        """Those of these ids [batch, position]; `unknown` is that of all words for which there is no token."""
        n = ids.shape[1]
        at = torch.arange(n)
        earlier = at[None, :] < at[:, None]
        inside = (at >= text.start) & (at < text.stop)
        known = inside & (ids != (-1 if unknown is None else unknown))
        copies = (ids[:, :, None] == ids[:, None, :]) & earlier & inside & known[:, :, None]
        follows, following = ids.roll(-1, 1), known.roll(-1, 1)
        met = ((follows[:, :, None] == ids[:, None, :]) & (at[None, :] <= at[:, None]) & inside).any(-1)
        again, always = copies.any(-1) & inside, inside.expand(ids.shape[0], -1)
        behind = at > text.start
        asked = torch.stack(
            [again, always & behind, again, always & behind, met & inside & following & (at < text.stop - 1),
             always & (at >= sinks + recent)]
        )  # fmt: skip
        return cls(ids, text, sinks, recent, asked, known, copies, follows)

    def on(self, device: torch.device) -> Rows:
        """The same on a device: a model's sites may be on several."""
        moved = {name: getattr(self, name).to(device) for name in ("ids", "asked", "known", "copies", "next_ids")}
        return replace(self, **moved)


@dataclass(frozen=True)
class Seen:
    """A site in a batch of windows.

    Attributes:
        scores: [batch, score, head] mean over the rows that each score asks for; NaN where there are none.
        entropy, distance: [batch, head, query] of the text's positions.
        totals: [quantity, head] sums over them, in the order of `TOTALS`.
        weight, query, key: [batch, head] the largest weight of a known token on another one that is not the first key.
    """

    scores: Tensor
    entropy: Tensor
    distance: Tensor
    totals: Tensor
    weight: Tensor
    query: Tensor
    key: Tensor


def measure(site: SiteCapture, rows: Rows) -> Seen:
    """What a site's heads do, as tensors of the CPU.

    Raises:
        CaptureError: its rows are no distributions over keys.
    """
    pattern = site.pattern
    if pattern.signed or not (pattern.normalised or pattern.has_scores):
        raise CaptureError("rows of this map are no distributions over keys", site=site.site.name)
    keys = site.peak_key.long()
    rows = rows.on(keys.device)
    duplicate, kept = _tiles(site, rows)
    there = rows.ids[:, None].expand(-1, keys.shape[1], -1).gather(-1, keys.clamp_min(0))
    at = torch.arange(keys.shape[-1], device=keys.device)
    found = (there == rows.next_ids[:, None]) & (keys <= at) & (keys >= rows.text.start) & (keys < rows.text.stop)
    each = torch.stack([site.induction, site.previous, duplicate, site.sink, found.to(kept.dtype), kept], 1)
    asked = rows.asked.transpose(0, 1)[:, :, None]  # [batch, score, 1, query]
    sums = each.double().nan_to_num(0.0).where(asked, 0.0).sum(-1)
    counts = asked.sum(-1)
    scores = sums.div(counts).where(counts > 0, torch.nan)
    text = rows.text
    known = rows.known[:, None].expand(-1, keys.shape[1], -1)
    elsewhere = (keys >= 1) & (keys != at) & known & known.gather(-1, keys.clamp_min(0))
    weight, query = site.peak.where(elsewhere, -1.0).max(-1)
    key = keys.gather(-1, query[..., None]).squeeze(-1)
    entropy, distance = site.entropy[..., text], site.distance[..., text]
    second = site.distance_var[..., text] + distance.square()
    totals = torch.stack([site.current[..., text], entropy, distance, second]).double().nansum((1, 3))
    given = scores, entropy, distance, totals, weight, query, key
    return Seen(*(each.cpu() for each in given))


def _tiles(site: SiteCapture, rows: Rows) -> tuple[Tensor, Tensor]:
    """[batch, head, query] weights on earlier copies of the query's token, and on keys that streaming caches keep."""
    pattern, n = site.pattern, site.shape[2]
    device = rows.copies.device
    duplicate, kept = torch.zeros(2, *site.shape[:3], device=device)
    at = torch.arange(n, device=device)
    for start in range(0, n, _STRIP):
        part = slice(start, min(start + _STRIP, n))
        tile = pattern.tile(part, slice(0, n)).float().nan_to_num(0.0)
        near = (at[part, None] - at < rows.recent) & (at <= at[part, None]) | (at < rows.sinks)
        duplicate[:, :, part] = torch.einsum("bhqk,bqk->bhq", tile, rows.copies[:, part].to(tile.dtype))
        kept[:, :, part] = torch.einsum("bhqk,qk->bhq", tile, near.to(tile.dtype))
    return duplicate, kept
