"""A head's own keys, values and queries, from captures of a model: what the probes store and ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.capture.site_capture import SiteCapture
from workbench.errors import CaptureError
from workbench.hooks.sites import Site
from workbench.hooks.split_models import check_unsplit
from workbench.kernels.softmax import SoftmaxPattern

if TYPE_CHECKING:
    from workbench.session.workbench import Workbench


@dataclass
class SitePairs:
    """A random sample of the tokens that went through one site.

    Attributes:
        k, v: [kv head, token, d_k] and [kv head, token, d_v]. q: [head, query, d_k], a sample of its own.
            Where they are `collect`ed, queries are as long as keys on average over the site, and `scale` makes up for
            it: some models scale their queries before the product and some after, and a key that stands in for a query
            should ask as sharply as a query does.
        sink: [token] bool, the first key of each sequence.
        scale, softcap: of the head's softmax.
        load: [head] mean number of effective keys, 1/Σp², over all real queries.
        n_seen: real tokens that were seen, of which k and v are a sample.
    """

    site: Site
    k: Tensor
    v: Tensor
    q: Tensor
    sink: Tensor
    scale: float
    softcap: float | None
    load: Tensor
    n_seen: int

    @property
    def n_tokens(self) -> int:
        """Pairs that are there to be stored."""
        return self.k.shape[1]


@dataclass
class _Sample:
    """Keeps the `size` tokens of highest random priority among all that it is shown: an even sample of a stream."""

    size: int
    generator: torch.Generator
    priority: Tensor = field(default_factory=lambda: torch.zeros(0))
    held: list[Tensor] = field(default_factory=list)
    seen: int = 0

    def add(self, tensors: list[Tensor]) -> None:
        """Take in tensors [..., token, d] (a flag is [token, 1]) that share their tokens."""
        n = tensors[0].shape[-2]
        self.seen += n
        drawn = torch.rand(n, generator=self.generator)
        together = [torch.cat(two, dim=-2) for two in zip(self.held, tensors, strict=True)] if self.held else tensors
        self.priority = torch.cat([self.priority, drawn])
        # In the order they came, so that a small sample that keeps everything keeps it as it was.
        best = self.priority.topk(min(self.size, len(self.priority))).indices.sort().values
        self.priority = self.priority[best]
        self.held = [tensor.index_select(-2, best.to(tensor.device)) for tensor in together]


@dataclass
class _Site:
    keys: _Sample
    queries: _Sample
    site: Site
    scale: float
    softcap: float | None
    load: Tensor | None = None
    n_queries: int = 0


def collect(
    wb: Workbench, batches: Any, sites: Any = None, *, pool: int = 2048, seed: int = 0, progress: bool = True
) -> list[SitePairs]:
    """Run the model on each batch and keep up to `pool` pairs, and as many queries, of every softmax site.

    Padding is left out: keys that no query sees, and queries that see no key. Sites that saw the same number of tokens
    keep the same ones.

    Raises:
        CaptureError: no batch, one that is no dict, no site that is a softmax of queries and keys, or a site that was
            asked for and is none.
    """
    several = [batches] if isinstance(batches, Mapping) else batches
    if not isinstance(several, Iterable):
        raise CaptureError(f"batches is a {type(batches).__name__}, expected dicts of model inputs")
    check_unsplit()
    found: dict[str, _Site] = {}
    skipped: dict[str, str] = {}
    for batch in _bar(several, progress):
        if not isinstance(batch, Mapping):
            raise CaptureError(f"a batch is a dict of model inputs, not {type(batch).__name__}")
        with (
            torch.no_grad(),
            wb.capture(("effective_keys",), sites, queries_keys=True, values=True, limit=None) as capture,
        ):
            wb.model(**batch)
        for call in capture.calls:
            for one in call:
                if not isinstance(one.lazy, SoftmaxPattern) or one.lazy.values is None:
                    kind = "none" if one.lazy is None else type(one.lazy).__name__
                    skipped[one.site.name] = f"kind {one.site.kind}, pattern {kind}"
                    continue
                _take(one, one.lazy, found, pool, seed)
    if not found and not skipped:
        raise CaptureError("there is no batch to probe with", hint="pass dicts of model inputs, such as task.batches")
    if skipped and (sites is not None or not found):
        name, why = next(iter(skipped.items()))
        none = f"none of the model's {len(skipped)} sites has them: probe what it stores with conditioning.memory"
        raise CaptureError(
            f"a capacity probe needs queries, keys and values of a softmax, which the site has not ({why})",
            site=name,
            hint="choose softmax sites with sites=" if found or sites is not None else none,
        )
    return [_finish(one) for one in found.values()]


def _bar(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    from tqdm.auto import tqdm

    bar: Iterable[Any] = tqdm(batches, desc="captures", disable=not progress)
    return bar


def _take(one: SiteCapture, pattern: SoftmaxPattern, found: dict[str, _Site], pool: int, seed: int) -> None:
    name, site = one.site.name, one.site
    if name not in found:
        keys, queries = (_Sample(pool, torch.Generator().manual_seed(seed + i)) for i in (0, 1))
        found[name] = _Site(keys, queries, site, pattern.scale, pattern.softcap)
    kept, b = found[name], pattern.n_batch
    seen = pattern.seen
    key_real = (seen.queries_per_key > 0).any(1).expand(b, -1)
    query_real = (seen.keys_per_query > 0).any(1).expand(b, -1)
    if site.kind == "self" and pattern.n_queries == pattern.n_keys:
        query_real = query_real & key_real
    if not bool(key_real.any()) or not bool(query_real.any()):
        return
    sink = torch.zeros_like(key_real).scatter_(1, key_real.to(torch.uint8).argmax(1, keepdim=True), True)
    assert pattern.values is not None
    k, v = (tensor.transpose(0, 1)[:, key_real].detach() for tensor in (pattern.k, pattern.values))
    kept.keys.add([k, v, sink[key_real][:, None]])
    kept.queries.add([pattern.q.transpose(0, 1)[:, query_real].detach()])
    effective = one.statistics["effective_keys"].transpose(0, 1)[:, query_real].double()
    load = effective.nan_to_num(0.0).sum(-1)
    kept.load = load if kept.load is None else kept.load + load
    kept.n_queries += effective.shape[1]


def _finish(one: _Site) -> SitePairs:
    if one.load is None:
        raise CaptureError("all tokens of the site are padding", site=one.site.name)
    k, v, sink = one.keys.held
    (q,) = one.queries.held
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    k, v, q = (tensor.to(dtype) for tensor in (k, v, q))
    load = one.load / one.n_queries
    key, query = ((x.double() ** 2).sum(-1).mean().sqrt().item() for x in (k, q))
    longer = query / key if key > 0 and query > 0 else 1.0
    return SitePairs(one.site, k, v, q / longer, sink[:, 0], one.scale * longer, one.softcap, load, one.keys.seen)
