"""Storing growing numbers of a head's pairs in memories of each rule, and asking for them again.

All heads of a site, all repeats and all sizes go through one set of memories: the memory of n pairs is that of the
size before with a block more written to it. Results are sums per repeat, from which `curves` makes the measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.conditioning.features import feature_map, unit
from workbench.analysis.conditioning.memories import Memory, memory
from workbench.analysis.conditioning.pairs import SitePairs

QUERIES = ("stored", "noisy", "own")
"""What is asked with: the stored keys, the stored keys with noise, the model's own queries."""
SUMS = ("product", "retrieved", "target", "cosine", "hits", "count")
"""Per repeat: Σ r·v, Σ‖r‖², Σ‖v‖², Σ cos(r, v), number of identified targets, number of queries."""
_TIE = 1e-5  # of the retrieval's length: targets this close to the best candidate are told apart by rounding only


_NEAR = 96 << 20  # bytes: with more heads at once than this holds, a CPU fetches from memory what its caches had


@dataclass(frozen=True)
class Plan:
    """What a probe does.

    Attributes:
        sizes: numbers of pairs n, rising. rules: names of rules. options: rule -> options of its memory.
        queries: kinds among `QUERIES`.
        repeats: how often pairs are drawn anew. n_queries: questions asked of each memory.
        noise: length of the noise in a noisy key over that of the key.
        features: feature map of the linear rules. unit_keys: whether their keys are scaled to length 1 after it.
        seed: of the draws. memory: bytes that the tensors of one go may take, about.
    """

    sizes: tuple[int, ...]
    rules: tuple[str, ...] = ("hebb", "delta", "softmax")
    queries: tuple[str, ...] = QUERIES
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    repeats: int = 32
    n_queries: int = 8
    noise: float = 0.5
    features: str = "identity"
    unit_keys: bool = True
    seed: int = 0
    memory: int = 1 << 29


@dataclass
class _Draw:
    """What is drawn for all heads of a site.

    Attributes:
        pairs: [repeat, n] tokens in the order they are stored. own: [repeat, query] the model's queries.
        noise: [repeat, n, d_k] of length 1 on average.
    """

    pairs: Tensor
    own: Tensor
    noise: Tensor


def draw(plan: Plan, n_tokens: int, n_own: int, d_k: int) -> _Draw:
    """The random choices of a probe, without replacement within a repeat; the same for the same sizes and seed."""
    generator = torch.Generator().manual_seed(plan.seed)
    pairs = torch.rand(plan.repeats, n_tokens, generator=generator).argsort(-1)[:, : plan.sizes[-1]]
    own = torch.randint(n_own, (plan.repeats, plan.n_queries), generator=generator)
    noise = torch.randn(plan.repeats, plan.sizes[-1], d_k, generator=generator) * d_k**-0.5
    return _Draw(pairs, own, noise)


def asked(n: int, n_queries: int) -> Tensor:
    """Which of n stored pairs are asked for: at most `n_queries`, spread evenly over the order of storing.

    >>> asked(8, 4).tolist(), asked(2, 4).tolist()
    ([1, 3, 5, 7], [0, 1])
    """
    m = min(n, n_queries)
    return (2 * torch.arange(m) + 1) * n // (2 * m)


def probe(pairs: SitePairs, plan: Plan) -> Tensor:
    """[sum, head, rule, query, n, repeat] float64 of `SUMS` for every head of a site."""
    n_heads, d_k = pairs.q.shape[0], pairs.k.shape[-1]
    drawn = draw(plan, pairs.n_tokens, pairs.q.shape[1], d_k)
    shape = (len(SUMS), n_heads, len(plan.rules), len(plan.queries), len(plan.sizes), plan.repeats)
    out = torch.zeros(shape, dtype=torch.float64)
    group = n_heads // pairs.k.shape[0]
    for heads in _chunks(pairs, plan):
        kv = torch.arange(heads.start, heads.stop) // group
        store = _Store(pairs.k[kv], pairs.v[kv], pairs.q[heads], drawn, plan, pairs.scale)
        held, previous = [_empty(rule, store, plan, pairs) for rule in plan.rules], 0
        for i, n in enumerate(plan.sizes):
            # The questions of all kinds to the memories of all rules are compared with the stored values in one go.
            targets = store.targets(n)
            asking = {softmax: store.questions(n, softmax) for softmax in {rule == "softmax" for rule in plan.rules}}
            read = []
            for rule, one in zip(plan.rules, held, strict=True):
                one.write(store.keys(rule)[..., previous:n, :], store.v[..., previous:n, :])
                read.append(one.read(asking[rule == "softmax"]))
            previous = n
            out[:, heads, :, :, i] = _compare(torch.cat(read, 2), targets, store, n).cpu()
    return out


def _chunks(pairs: SitePairs, plan: Plan) -> Iterator[slice]:
    """Slices of heads whose tensors fit the plan's memory."""
    n, d_k, d_v = plan.sizes[-1], pairs.k.shape[-1], pairs.v.shape[-1]
    width = feature_map(plan.features, d_k)[1]
    per_head = pairs.k.element_size() * plan.repeats * (n * (4 * d_k + 4 * width + 3 * d_v) + 3 * width * d_v)
    memory = min(plan.memory, _NEAR) if pairs.k.device.type == "cpu" else plan.memory
    step = max(1, memory // per_head)
    for start in range(0, pairs.q.shape[0], step):
        yield slice(start, min(start + step, pairs.q.shape[0]))


def _empty(rule: str, store: _Store, plan: Plan, pairs: SitePairs) -> Memory:
    k = store.keys(rule)
    options = dict(plan.options.get(rule, {}))
    if rule == "softmax":
        options = {"scale": pairs.scale, "softcap": pairs.softcap} | options
    return memory(rule, k.shape[-1], store.v.shape[-1], k.shape[:2], dtype=k.dtype, device=k.device, **options)


class _Store:
    """Keys, values and questions of some heads, [head, repeat, n or query, d]: for the linear rules after features."""

    def __init__(self, k: Tensor, v: Tensor, q: Tensor, drawn: _Draw, plan: Plan, scale: float) -> None:
        device = k.device
        self.n_queries, self.kinds = plan.n_queries, plan.queries
        phi, _ = feature_map(plan.features, k.shape[-1])

        def linear(x: Tensor) -> Tensor:
            return unit(phi(x)) if plan.unit_keys else phi(x)

        pairs, own = drawn.pairs.to(device), drawn.own.to(device)
        raw, self.v = k[:, pairs], v[:, pairs]
        self.lengths = self.v.norm(dim=-1)
        self.directions = unit(self.v)
        self._k = {True: raw, False: linear(raw)}  # by whether the rule is softmax
        self._q: dict[tuple[str, bool], Tensor] = {}
        if "noisy" in plan.queries:
            noisy = raw + plan.noise * raw.norm(dim=-1, keepdim=True) * drawn.noise.to(raw)
            self._q |= {("noisy", True): noisy, ("noisy", False): linear(noisy)}
        if "own" in plan.queries:
            asking = q[:, own]
            self._q |= {("own", True): asking, ("own", False): linear(asking)}
            scores = scale * asking @ raw.transpose(-1, -2)
            self._best = scores.cummax(-1).indices  # [head, repeat, query, n]: of the first n keys, the one it prefers

    def keys(self, rule: str) -> Tensor:
        """[head, repeat, n, width] as the rule stores them."""
        return self._k[rule == "softmax"]

    def questions(self, n: int, softmax: bool) -> Tensor:
        """Queries of all kinds, one kind after the other: [head, repeat, question, width]."""
        which = asked(n, self.n_queries).to(self.v.device)
        stored = {"stored": self._k[softmax]} | {kind: q for (kind, of), q in self._q.items() if of == softmax}
        return torch.cat(
            [stored[kind] if kind == "own" else stored[kind].index_select(2, which) for kind in self.kinds], 2
        )

    def targets(self, n: int) -> list[Tensor]:
        """The pairs that they ask for, [head, repeat, question], one tensor for each kind."""
        which = asked(n, self.n_queries).to(self.v.device).expand(*self.v.shape[:2], -1)
        return [self._best[..., n - 1] if kind == "own" else which for kind in self.kinds]


def _compare(r: Tensor, targets: list[Tensor], store: _Store, n: int) -> Tensor:
    """[sum, head, rule, kind, repeat] of `SUMS` for retrievals r [head, repeat, rule · question, d_v]."""
    index = torch.cat(targets, 2)
    n_rules = r.shape[2] // index.shape[2]
    likeness = r @ store.directions[:, :, :n].transpose(-1, -2)
    best = likeness.amax(-1)
    own = likeness.gather(-1, index.repeat(1, 1, n_rules)[..., None])[..., 0]  # r·v / ‖v‖
    wanted = store.lengths.gather(2, index).repeat(1, 1, n_rules)
    length = r.norm(dim=-1)
    hits = (own >= best - _TIE * length) & (best > 0)
    cosine = (own / length.clamp(min=torch.finfo(own.dtype).tiny)).clamp(-1, 1)  # 0 where either length is
    each = (own * wanted, length**2, wanted**2, cosine, hits.to(own.dtype), torch.ones_like(own))
    parts = torch.stack(each).unflatten(-1, (n_rules, -1)).split([kind.shape[2] for kind in targets], dim=-1)
    return torch.stack([part.sum(-1) for part in parts], -1).double().permute(0, 1, 3, 4, 2)


def default_sizes(limit: int) -> tuple[int, ...]:
    """Numbers of pairs to try up to a limit: 1, 2, 4, and 32 in even steps.

    >>> default_sizes(5)
    (1, 2, 3, 4, 5)
    """
    even: Sequence[int] = [round(limit * i / 32) for i in range(1, 33)]
    return tuple(sorted({n for n in (1, 2, 4, *even) if 1 <= n <= limit}))
