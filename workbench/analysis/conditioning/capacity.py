"""How much a head can hold: its own keys and values in memories of several rules, beside what the theory expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.analysis.conditioning import theory
from workbench.analysis.conditioning.curves import CEILING_DB, MEASURES, check_criterion, knees
from workbench.analysis.conditioning.features import feature_map, unit
from workbench.analysis.conditioning.geometry import DIMENSIONS, geometry
from workbench.analysis.conditioning.memories import RULES
from workbench.analysis.conditioning.pairs import SitePairs, collect
from workbench.analysis.conditioning.probe import QUERIES, Plan, default_sizes, probe
from workbench.analysis.conditioning.with_importance import correlations, scores_of
from workbench.analysis.importance.result import HeadImportance
from workbench.errors import CaptureError, WorkbenchError, expect, nearest
from workbench.session.workbench import Workbench
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd

THEORIES = ("d_k", *DIMENSIONS)
"""What stands for d_k in the theory's curves: the width of the keys, or one of their effective dimensions."""
LIMITS = (
    "The theory stores independent, uniform keys and values by Hebb's rule. It has no term for values that share a "
    "mean or lie in few directions, for keys that go with their values, for the other rules, for a softmax, or for "
    "queries that are not stored keys.",
    "Values that share a mean raise the cosine and the SNR of whatever is retrieved, without one pair being told from "
    "another: n* is then far above the theory's, and top-1 says what is really told apart.",
    "Pairs are drawn from all tokens that were seen, in random order: positional rules of the mask (causal, window) "
    "and biases that depend on position have no part in the retrieval.",
    "What the model's own queries ask for is not known. Their target here is the value of the stored key that scores "
    "highest, so that a head which is meant to average looks poor; and a linear rule whose product of query and key is "
    "negative gives that value back with the wrong sign, even where it is the only one.",
    "Intervals are over draws of pairs from the same texts, not over texts.",
    "A correlation with importance is one over heads, which differ in much else, such as their layer; heads whose n* "
    "is censored share a rank.",
)


@dataclass(frozen=True, repr=False)
class Capacity(Result):
    """What `capacity` measured. Rows are heads, in the order of the sites.

    Attributes:
        sites, layers, heads: of each row, its site's name, layer and head. labels: such as "L3H5".
        sizes: numbers of stored pairs n. rules, queries, measures: names along the axes of `curves`.
        curves, low, high: [measure, row, rule, query, n]; low and high are 95 % intervals over the draws of
            pairs, of no width where all draws agree, such as a top-1 of 1.
        criterion: measure and threshold that say what still counts as held.
        n_star, n_low, n_high: [row, rule, query], n at which the criterion is lost, with its interval; 0 if even the
            smallest n fails it. censored: [row, rule, query], it still held at the largest n, and n* is at least that.
        d_k, d_v: [row] width of keys (after the feature map) and values.
        dimension: [row, 4] effective dimensions of the keys, by `dimensions`.
        overlap: [row] mean squared cosine of two keys. excess: [row] times d_k: 1 for random keys, d_k for equal ones.
        spectrum: [row, d] eigenvalues of the keys' second moment, falling, of sum 1; zeros fill up narrower heads.
        theories: names along the axis of the theory: d_k itself, then the dimensions.
        theory_snr_db: [row, theory, n] expected by `theory.snr` for Hebb's rule and stored keys.
        theory_n_star: [row, theory] `theory.average_capacity` at the criterion; NaN unless the criterion is the SNR.
        effective_keys: [row] the load: how many keys the head really mixes (1/Σp²), a mean over queries.
        headroom: [row, rule, query] n* minus load.
        n_tokens: [row] pairs that the draws are from.
        importance: [row] the scores that were given, NaN where none was; None if no scores were given.
        correlation: quantity -> (Spearman's ρ, low, high) with the importance; empty if no scores were given.
        limits: what the numbers do not say.
    """

    form = "workbench.capacity"
    filled: ClassVar = ("n",)

    sites: Annotated[tuple[str, ...], "row"]
    layers: Annotated[tuple[int, ...], "row"]
    heads: Annotated[tuple[int, ...], "row"]
    sizes: Annotated[tuple[int, ...], "n"]
    rules: Annotated[tuple[str, ...], "rule"]
    queries: Annotated[tuple[str, ...], "query"]
    measures: Annotated[tuple[str, ...], "measure"]
    curves: Float[Tensor, "measure row rule query n"]
    low: Float[Tensor, "measure row rule query n"]
    high: Float[Tensor, "measure row rule query n"]
    criterion: tuple[str, float]
    n_star: Float[Tensor, "row rule query"]
    n_low: Float[Tensor, "row rule query"]
    n_high: Float[Tensor, "row rule query"]
    censored: Bool[Tensor, "row rule query"]
    d_k: Int[Tensor, " row"]
    d_v: Int[Tensor, " row"]
    dimensions: Annotated[tuple[str, ...], "dimension"]
    dimension: Float[Tensor, "row dimension"]
    overlap: Float[Tensor, " row"]
    spectrum: Float[Tensor, "row d"]
    theories: Annotated[tuple[str, ...], "theory"]
    theory_snr_db: Float[Tensor, "row theory n"]
    theory_n_star: Float[Tensor, "row theory"]
    effective_keys: Float[Tensor, " row"]
    n_tokens: Int[Tensor, " row"]
    importance: Float[Tensor, " row"] | None
    correlation: dict[str, tuple[float, float, float]]
    limits: tuple[str, ...]
    provenance: dict[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the heads; the site's name goes before where two sites would share one."""
        short = [f"L{layer}H{head}" for layer, head in zip(self.layers, self.heads, strict=True)]
        if len(set(short)) == len(short):
            return tuple(short)
        return tuple(f"{site}:H{head}" for site, head in zip(self.sites, self.heads, strict=True))

    @property
    def excess(self) -> Tensor:
        """[row] mean squared cosine of two keys times d_k: 1 for random keys, d_k for keys that are all equal."""
        return self.overlap * self.d_k

    @property
    def headroom(self) -> Tensor:
        """[row, rule, query] n* minus load; at least that where n* is censored."""
        return self.n_star - self.effective_keys[:, None, None]

    def row(self, layer_or_site: int | str, head: int) -> int:
        """Row of a head, by (layer, head) or (site, head).

        Raises:
            CaptureError: there is none, or several sites have that layer.
        """
        where = self.sites if isinstance(layer_or_site, str) else self.layers
        found = [i for i, (w, h) in enumerate(zip(where, self.heads, strict=True)) if (w, h) == (layer_or_site, head)]
        if len(found) != 1:
            many = "several heads" if found else "no head"
            raise CaptureError(f"there is {many} ({layer_or_site!r}, {head}) in this result", hint="name the site")
        return found[0]

    def curve(self, measure: str, rule: str, query: str = "stored") -> tuple[Tensor, Tensor, Tensor]:
        """[row, n] of a measure with the bounds of its interval.

        Raises:
            WorkbenchError: the result has no such measure, rule or kind of query.
        """
        named = ((measure, self.measures), (rule, self.rules), (query, self.queries))
        for name, known in named:
            if name not in known:
                raise WorkbenchError(f'the result has no "{name}"', hint=nearest(name, known))
        m, r, q = (known.index(name) for name, known in named)
        return self.curves[m, :, r, q], self.low[m, :, r, q], self.high[m, :, r, q]

    @property
    def table(self) -> pd.DataFrame:
        """One row per head, rule and kind of query."""
        import pandas as pd

        rows = []
        for i, label in enumerate(self.labels):
            head = {
                "site": self.sites[i], "layer": self.layers[i], "head": self.heads[i], "label": label,
                "d_k": int(self.d_k[i]), "load": float(self.effective_keys[i]), "overlap": float(self.overlap[i]),
                "excess": float(self.excess[i]),
            }  # fmt: skip
            head |= {f"dimension {name}": float(self.dimension[i, j]) for j, name in enumerate(self.dimensions)}
            head |= {f"theory {name}": float(self.theory_n_star[i, j]) for j, name in enumerate(self.theories)}
            if self.importance is not None:
                head["importance"] = float(self.importance[i])
            for r, rule in enumerate(self.rules):
                for q, query in enumerate(self.queries):
                    at = (i, r, q)
                    rows.append(
                        head
                        | {"rule": rule, "query": query, "n_star": float(self.n_star[at])}
                        | {"n_low": float(self.n_low[at]), "n_high": float(self.n_high[at])}
                        | {"censored": bool(self.censored[at]), "headroom": float(self.headroom[at])}
                    )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        measure, threshold = self.criterion
        return (
            f"Capacity({len(self.heads)} heads, n to {self.sizes[-1]}; {', '.join(self.rules)}; n* at "
            f"{measure} {threshold:g})"
        )


def capacity(
    wb: Workbench,
    batches: Any,
    *,
    rules: Sequence[str] = ("hebb", "delta", "softmax"),
    sizes: Sequence[int] | None = None,
    queries: Sequence[str] = QUERIES,
    criterion: tuple[str, float] = ("snr_db", 0.0),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    features: str = "identity",
    unit_keys: bool = True,
    noise: float = 0.5,
    repeats: int = 32,
    n_queries: int = 8,
    sites: Any = None,
    importance: HeadImportance | Mapping[tuple[int | str, int], float] | None = None,
    pool: int = 2048,
    seed: int = 0,
    memory: int = 1 << 29,
    progress: bool = True,
) -> Capacity:
    """Probe how many of its own pairs each head can hold and give back (arXiv 2508.08289, theorem 6, on real heads).

    Keys and values are captured on the batches and drawn at random from all their tokens. For growing n, n pairs are
    stored in memories of each rule, which are then asked with the stored keys, with noisy ones, and with the model's
    own queries (for the pair whose key scores highest). "softmax" is the head's own: its scale and softcap, keys as
    they are, and keys that ask at the mean length of its site's queries. The linear rules store keys of length 1 after
    the feature map.

    Degenerate heads have limits, at the criterion of 0 dB: from keys that are all equal Hebb's rule and the softmax
    give back the sum and the mean of all values, and n* is 2 = 1 + dimension, as the theory has it; so it is under
    Hebb's rule where d_k = 1. Where all keys or all values are 0 a linear rule retrieves nothing: cosine and top-1 are
    0, the relative error is 1, the SNR at its floor, and n* is 0.

    Args:
        wb: an attached model. batches: a dict of model inputs, or several.
        rules: names from `conditioning.RULES`. options: such as {"delta": {"rate": 0.5}}.
        sizes: numbers of pairs; up to 256, or to the fewest tokens that a site has seen, if None.
        queries: kinds among "stored", "noisy", "own".
        criterion: measure ("cosine", "relative_error", "top1", "snr_db") and threshold. At an SNR of 0 dB interference
            is as strong as the signal: the theory's n* is 1 + d_k.
        features: feature map of the linear rules. unit_keys: False leaves their keys as long as they are.
        noise: length of the noise over that of the key, in a noisy key.
        repeats: draws of pairs. n_queries: questions to each memory, evenly over the order of storing.
        sites: names or Sites; all softmax sites if None.
        importance: what `head_importance` found (its first method and measure), or (layer, head) -> score, or
            (site's name or alias, head) -> score, to correlate with.
        pool: most tokens to keep per site, an even sample of all.
        seed: of all draws.
        memory: bytes that one go may take, about; heads are split up to stay within it.

    Raises:
        CaptureError: no batch; a site without queries, keys and values of a softmax; more pairs than tokens.
        WorkbenchError: unknown rule, feature map, measure or query; a rate outside its stable range (with the bound);
            importance of heads that were not probed, or by a layer that several sites have.

    >>> import workbench
    >>> model = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
    >>> with workbench.attach(model) as wb:
    ...     found = workbench.capacity(wb, {"src": torch.randn(2, 20, 16)}, progress=False)
    >>> found
    Capacity(4 heads, n to 40; hebb, delta, softmax; n* at snr_db 0)
    """
    expect(Workbench, wb=wb)
    _check(rules, queries, sizes, repeats, n_queries, noise, pool)
    check_criterion(*criterion)
    feature_map(features, 1)
    found = collect(wb, batches, sites, pool=pool, seed=seed, progress=progress)
    fewest = min(found, key=lambda one: one.n_tokens)
    chosen = default_sizes(min(256, fewest.n_tokens)) if sizes is None else tuple(sorted(set(sizes)))
    if chosen[-1] > fewest.n_tokens:
        kept = f", of which the pool keeps {fewest.n_tokens}" if fewest.n_tokens < fewest.n_seen else ""
        raise CaptureError(
            f"{chosen[-1]} pairs cannot be stored: the site has seen {fewest.n_seen} tokens{kept}",
            site=fewest.site.name,
            hint="pass more batches, smaller sizes=, or a larger pool=",
        )
    plan = Plan(
        chosen,
        tuple(rules),
        tuple(queries),
        options or {},
        repeats,
        n_queries,
        noise,
        features,
        unit_keys,
        seed,
        memory,
    )
    held = {
        "criterion": list(criterion), "features": features, "unit_keys": unit_keys, "noise": noise, "repeats": repeats,
        "n_queries": n_queries, "pool": pool, "seed": seed,
        "options": {rule: dict(given) for rule, given in (options or {}).items()},
    }  # fmt: skip
    return summarise(found, plan, criterion, importance, wb.provenance() | held, progress=progress)


def summarise(
    found: Sequence[SitePairs],
    plan: Plan,
    criterion: tuple[str, float] = ("snr_db", 0.0),
    importance: HeadImportance | Mapping[Any, float] | None = None,
    provenance: Mapping[str, Any] | None = None,
    *,
    progress: bool = False,
) -> Capacity:
    """Probe and measure collected pairs; see `capacity`."""
    from tqdm.auto import tqdm

    parts = []
    for pairs in tqdm(found, desc="capacity", disable=not progress):
        sums = probe(pairs, plan)
        parts.append((pairs, knees(sums, plan.sizes, *criterion), _keys(pairs, plan)))
    per_head = [(pairs.site, h) for pairs, _, _ in parts for h in range(pairs.q.shape[0])]
    widest = max(spectrum.shape[-1] for *_, (_, spectrum, _) in parts)

    def per_row(of: Any) -> Tensor:
        return torch.tensor([of(pairs) for pairs, _, _ in parts for _ in range(pairs.q.shape[0])])

    joined = [torch.cat([knee[i] for _, knee, _ in parts], dim=1 if i < 3 else 0) for i in range(7)]
    dimension, overlap = (torch.cat([of_keys[i] for *_, of_keys in parts]) for i in (0, 2))
    pad = torch.nn.functional.pad
    spectrum = torch.cat([pad(s, (0, widest - s.shape[-1])) for *_, (_, s, _) in parts])
    d_k = torch.tensor([s.shape[-1] for *_, (_, s, _) in parts for _ in range(len(s))])
    load = torch.cat([pairs.load.double().cpu() for pairs, _, _ in parts])
    effective = torch.cat([d_k[:, None].double(), dimension], dim=1)
    scores = scores_of(per_head, importance)
    n_star = joined[3]
    quantities = {"effective dimension": dimension[:, 0], "load": load}
    for r, rule in enumerate(plan.rules):
        n = n_star[:, r, 0]
        quantities |= {f"n* {rule}": n, f"headroom {rule}": n - load}
    return Capacity(
        sites=tuple(site.name for site, _ in per_head),
        layers=tuple(site.layer for site, _ in per_head),
        heads=tuple(head for _, head in per_head),
        sizes=plan.sizes,
        rules=plan.rules,
        queries=plan.queries,
        measures=MEASURES,
        curves=joined[0], low=joined[1], high=joined[2],
        criterion=(criterion[0], float(criterion[1])),
        n_star=n_star, n_low=joined[4], n_high=joined[5], censored=joined[6],
        d_k=d_k,
        d_v=per_row(lambda pairs: pairs.v.shape[-1]),
        dimensions=DIMENSIONS,
        dimension=dimension,
        overlap=overlap,
        spectrum=spectrum,
        theories=THEORIES,
        theory_snr_db=_expected(effective, plan.sizes),
        theory_n_star=_expected_n(effective, criterion),
        effective_keys=load,
        n_tokens=per_row(lambda pairs: pairs.n_tokens),
        importance=scores,
        correlation={} if scores is None else correlations(quantities, scores),
        limits=LIMITS,
        provenance=dict(provenance or {}),
    )  # fmt: skip


def _keys(pairs: SitePairs, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Geometry of the keys as the linear rules store them, for each query head."""
    phi, _ = feature_map(plan.features, pairs.k.shape[-1])
    keys = phi(pairs.k)
    found = geometry(unit(keys) if plan.unit_keys else keys, pairs.sink)
    group = pairs.q.shape[0] // pairs.k.shape[0]
    dimension, spectrum, overlap = (part.cpu().repeat_interleave(group, dim=0) for part in found)
    return dimension, spectrum, overlap


def _expected(dimension: Tensor, sizes: Sequence[int]) -> Tensor:
    """[row, theory, n] SNR in dB; without any dimension the keys are 0 and nothing is retrieved."""
    n = torch.tensor(list(sizes), dtype=torch.float64)
    noise = theory.interference_power(n, dimension.clamp(min=1e-300)[..., None])
    found = (-10 * noise.clamp(min=1e-30).log10()).clamp(-CEILING_DB, CEILING_DB)
    return torch.where(dimension[..., None] > 0, found, -CEILING_DB)


def _expected_n(dimension: Tensor, criterion: tuple[str, float]) -> Tensor:
    measure, threshold = criterion
    if measure != "snr_db":
        return torch.full_like(dimension, torch.nan)
    found = theory.average_capacity(dimension, 10 ** (threshold / 10))
    return torch.where(dimension > 0, found, 0.0)


def _check(
    rules: Sequence[str],
    queries: Sequence[str],
    sizes: Sequence[int] | None,
    repeats: int,
    n_queries: int,
    noise: float,
    pool: int,
) -> None:
    for what, given, known in (("learning rule", rules, list(RULES)), ("kind of query", queries, list(QUERIES))):
        if isinstance(given, str) or not given or len(set(given)) != len(given):
            raise WorkbenchError(f"{what}s are a list of different names, not {given!r}", hint=", ".join(known))
        for name in given:
            if name not in known:
                raise WorkbenchError(f'there is no {what} "{name}"', hint=nearest(name, known))
    if sizes is not None and (not sizes or min(sizes) < 1):
        raise WorkbenchError(f"sizes are numbers of pairs from 1 on, not {list(sizes)}")
    for name, count in (("repeats", repeats), ("n_queries", n_queries), ("pool", pool)):
        if count < 1:
            raise WorkbenchError(f"{name} is {count}; it must be at least 1")
    if not 0 <= noise < float("inf"):
        raise WorkbenchError(f"noise is {noise}; it is a length, at least 0")
