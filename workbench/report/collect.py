"""What the page shows of one capture: plain numbers, names and bytes, read once from the capture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from workbench.errors import ReportError, WorkbenchError
from workbench.report.encode import Bools, Bytes, Floats, base64_size, packed_size, quantise

if TYPE_CHECKING:
    from workbench.capture import Capture

EXACT_CELLS = 256 * 256
"""A map of up to so many cells is kept cell by cell; a larger one is max-pooled."""
_CHUNK_CELLS = 1 << 24

METRICS: dict[str, tuple[str, str, str]] = {
    "entropy": ("Entropy", "nats", "how spread out a row is, −Σ p ln p"),
    "effective_keys": ("Effective keys", "tokens", "how many keys share a row, 1 / Σ p²"),
    "distance": ("Distance", "tokens", "how far away a row looks, mean of |query − key|"),
    "sink": ("Sink", "mass", "weight on the first key that a query sees"),
    "previous": ("Previous token", "mass", "weight on the position before the query"),
    "current": ("Current token", "mass", "weight on the query’s own position"),
    "induction": ("Induction", "mass", "weight on tokens that follow an earlier copy of the query’s token"),
    "peak": ("Peak", "mass", "largest weight of a row"),
}
"""Row statistics that make a head map: label, unit, meaning."""


@dataclass
class SiteMap:
    """The patterns of one site, [head, row, column].

    Attributes:
        coded: quantised weights, see `encode`.
        block: tokens per cell edge; 1 when every cell is one query and one key.
        error: largest absolute error of the quantisation.
        first: first column that any query sees.
        sink: [head, query] weight on the first key; None when it is not known.
        top_keys, top_weights: [head, query, n], exact; key −1 fills up short rows.
        key_bytes: bytes per key on the page; the largest number stands for key −1.
    """

    coded: Bytes
    block: int
    error: float
    first: int
    sink: Floats | None
    top_keys: np.ndarray[Any, np.dtype[np.int64]]
    top_weights: Floats
    key_bytes: int = 2

    def size(self) -> int:
        """Characters that the map alone takes on the page."""
        return packed_size(self.coded)

    def extra_size(self) -> int:
        """Characters that the exact weights beside the map take."""
        sink = 0 if self.sink is None else base64_size(4 * self.sink.size)
        return sink + base64_size(self.key_bytes * self.top_keys.size) + base64_size(4 * self.top_weights.size)


@dataclass
class SiteData:
    """One site: its card, its head averages per metric, its patterns or why there are none.

    `weights` says what the model's own weights are; where they are signed or unnormalised, the page shows |A| per row.
    """

    name: str
    layer: int
    kind: str
    tower: str
    n_heads: int
    n_kv_heads: int | None
    d_head: int | None
    kernel: str
    shape: tuple[int, int, int, int]
    queries: list[str] | None
    keys: list[str] | None
    weights: str = "normalised"
    means: dict[str, list[float]] = field(default_factory=dict)
    map: SiteMap | None = None
    missing: str | None = None

    @property
    def group(self) -> str:
        """The head map that the site belongs to: "Encoder self-attention"."""
        kind = f"{self.kind}-attention" if self.kind in ("self", "cross") else f"{self.kind} attention"
        words = kind if self.kind == "cross" or not self.tower else f"{self.tower} {kind}"
        return words[:1].upper() + words[1:]


def single_call(capture: Capture) -> tuple[Capture, int]:
    """The call that the page shows, the first, and how many there are."""
    calls = getattr(capture, "calls", None)
    if calls is None or not hasattr(capture, "sites"):
        raise ReportError(
            f"a report shows captures, not {type(capture).__name__}",
            hint="pass the object that `with wb.capture() as cap` leaves behind",
        )
    if not calls:
        raise ReportError("the capture is empty", hint="call the model inside `with wb.capture() as cap:`")
    return calls[0], len(calls)


def collect(call: Capture, batch: int, n_top: int) -> list[SiteData]:
    """Everything the page shows of one forward call's batch row, with the `n_top` largest weights of every row."""
    found = []
    for site in call.sites:
        record = call[site.name]
        data = SiteData(
            name=site.name,
            layer=int(site.layer),
            kind=str(site.kind),
            tower=str(getattr(site, "tower", "") or ""),
            n_heads=_four(record.shape)[1],
            n_kv_heads=site.n_kv_heads,
            d_head=site.d_head,
            kernel=str(record.kernel or "unknown"),
            shape=_four(record.shape),
            queries=_row(call.query_tokens(site.name), batch),
            keys=_row(call.key_tokens(site.name), batch),
            weights=record.marks,
        )
        for name in METRICS:
            if name in record.statistics:
                data.means[name] = _mean_over_queries(record.statistics[name][batch])
        try:
            data.map = _site_map(record.pattern, data.shape, batch, n_top)
        except WorkbenchError as error:
            data.missing = str(error)
        found.append(data)
    return found


def _four(shape: Sequence[int]) -> tuple[int, int, int, int]:
    batch, head, query, key = (int(size) for size in shape)
    return batch, head, query, key


def _row(tokens: Sequence[Sequence[str]] | None, batch: int) -> list[str] | None:
    return None if tokens is None else list(tokens[batch])


def _numpy(tensor: Tensor) -> Floats:
    return np.asarray(tensor.detach().float().cpu().numpy(), dtype=np.float32)


def _mean_over_queries(rows: Tensor) -> list[float]:
    """One number per head from [head, query]; queries that see no key do not count."""
    return [float(value) for value in rows.detach().double().cpu().nanmean(dim=-1)]


def _site_map(pattern: Any, shape: tuple[int, int, int, int], batch: int, n_top: int) -> SiteMap:
    _, heads, queries, keys = shape
    if pattern.by_magnitude:
        pattern = pattern.magnitude()
    names = ["top_keys"] if n_top else []
    if queries * keys <= EXACT_CELLS:
        block = 1
        weights = _dense(pattern, shape, batch)
    else:
        block = 2
        while -(-queries // block) * -(-keys // block) > EXACT_CELLS:
            block *= 2
        names += ["pooled_max", "sink"]
    found = pattern.statistics(names, block=block, n_top=max(n_top, 1)) if names else {}
    if block > 1:
        weights = _numpy(found["pooled_max"][batch])
    if weights.size and (weights.min() < 0 or weights.max() > 1 + 1e-3):
        raise ReportError(
            f"the weights run from {weights.min():.3g} to {weights.max():.3g}, and the page shows those from 0 to 1",
            hint="show a pattern whose rows are normalised and not signed",
        )
    coded, error = quantise(np.nan_to_num(weights), _seen(pattern, weights, block))
    seen = np.flatnonzero(coded.any(axis=(0, 1)))
    first = int(seen[0]) if seen.size else 0
    if block == 1:
        sink: Floats | None = np.ascontiguousarray(weights[:, :, first]) if keys else None
    else:
        sink = _numpy(found["sink"][batch])
    if n_top:
        top_keys = found["top_keys_index"][batch].detach().cpu().numpy().astype(np.int64)
        top_weights = _numpy(found["top_keys_weight"][batch])
    else:
        top_keys, top_weights = np.zeros((heads, queries, 0), np.int64), np.zeros((heads, queries, 0), np.float32)
    return SiteMap(coded, block, error, first, sink, top_keys, top_weights, 2 if keys < 0xFFFF else 4)


def _seen(pattern: Any, weights: Floats, block: int) -> Bools | None:
    """What each head may see where heads have layouts of their own; None where all see the same."""
    if pattern.mask.layout is None or pattern.mask.tensor is not None:
        return None
    if block > 1:
        return np.asarray(weights > 0)
    whole = slice(0, pattern.n_queries), slice(0, pattern.n_keys), slice(0, 1), slice(0, pattern.n_heads)
    return np.asarray(pattern.mask.visible(*whole).cpu().numpy())


def _dense(pattern: Any, shape: tuple[int, int, int, int], batch: int) -> Floats:
    """All heads of a batch row, [head, query, key], a few heads at a time: a dense tile holds the whole batch."""
    n_batch, heads, queries, keys = shape
    step = max(1, _CHUNK_CELLS // max(1, n_batch * queries * keys))
    parts = [
        _numpy(pattern.dense(heads=list(range(start, min(start + step, heads))))[batch])
        for start in range(0, heads, step)
    ]
    return np.concatenate(parts, axis=0)
