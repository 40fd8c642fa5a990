"""What a capture was asked for: which statistics of which sites, with which options, and what else it keeps."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import Tensor

from workbench.hooks.sites import Site
from workbench.kernels.gradients import GRADIENT_SUMS
from workbench.kernels.patterns import DENSE_LIMIT
from workbench.kernels.statistics import Options, known

APART = frozenset({"tokens", "keep_on"})
"""Settings that are no facts of a file: a tensor, and what changes nothing of what is kept."""


@dataclass(frozen=True)
class Settings:
    """What a capture keeps.

    Attributes:
        statistics: names to stream at every site.
        sites: which sites, or None for all.
        z: keep A·V per head. pattern: keep dense patterns. queries_keys: keep q and k, so that any part of the pattern
            can be computed later. values: keep v too.
        tokens: ids [batch, position] for `induction`; found in the inputs if None.
        gradients: keep ∂L/∂z and the sums of A∘∂L/∂A.
        sink_keys, n_top, block: see `workbench.kernels.statistics.Options`.
        limit: most bytes to keep in all.
        keep_on: where queries, keys, masks and values are kept: on their "device", or on the "host".
    """

    statistics: tuple[str, ...] = ("entropy", "received")
    sites: frozenset[str] | None = None
    z: bool = False
    pattern: bool = False
    queries_keys: bool = True
    values: bool = False
    gradients: bool = False
    tokens: Tensor | None = None
    sink_keys: tuple[int, ...] | None = None
    n_top: int = 8
    block: int = 16
    limit: int | None = DENSE_LIMIT
    keep_on: Literal["device", "host"] = "device"

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON facts, and the ids (as "tokens") if they were given, for a file."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in APART}
        facts["sites"] = None if self.sites is None else sorted(self.sites)
        return facts, {} if self.tokens is None else {"tokens": self.tokens}

    def names_at(self, site: Site) -> list[str]:
        """The statistics that exist at a site (`Site.has`); of a gate always its factor, "row_sum"."""
        names = [name for name in self.statistics if site.has(name)]
        return names if site.kind != "gate" or "row_sum" in names else [*names, "row_sum"]

    def options(self, tokens: Tensor | None, token_before: Tensor | None = None) -> Options:
        """What the statistics need, with these ids unless others were given."""
        if self.tokens is not None:
            tokens, token_before = self.tokens, None
        return Options(tokens, self.sink_keys, self.n_top, self.block, token_before)

    def bytes_for(self, shape: tuple[int, int, int, int], n_kv_heads: int, d_head: int, itemsize: int = 4) -> int:
        """Bytes that a call of this [batch, head, query, key] shape will keep, masks aside."""
        b, h, q, k = shape
        sizes = {
            "query": q,
            "key": k,
            "query top": q * self.n_top * 3,
            "block": -(-q // self.block) * -(-k // self.block),
        }
        numbers = sum(sizes[known(name).axes] for name in self.statistics) * b * h
        kept = numbers * max(4, itemsize)
        if self.queries_keys:
            kept += b * (h * q + n_kv_heads * k) * d_head * itemsize + b * h * q * max(4, itemsize)
        kept += b * n_kv_heads * k * d_head * itemsize if self.values else 0
        kept += b * h * q * d_head * itemsize if self.z else 0
        kept += self.gradient_bytes(shape, d_head, itemsize)
        return kept + (b * h * q * k * max(4, itemsize) if self.pattern else 0)

    @property
    def on_device(self) -> Settings:
        """What of it stays on the model's device."""
        return self if self.keep_on == "device" else replace(self, queries_keys=False, values=False)

    def gradient_bytes(self, shape: tuple[int, int, int, int], d_head: int, itemsize: int = 4) -> int:
        """Those of `bytes_for` that gradients will take once they arrive."""
        b, h, q, k = shape
        sums = sum({"query": q, "key": k, "": 1}[s.axes] for s in GRADIENT_SUMS.values())
        return b * h * (q * d_head + sums) * max(4, itemsize) if self.gradients else 0
