"""Overlap of circuits: p-values where nothing is shared, intervals and stability where the truth is known."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.overlap_null import Renamings, beyond_degrees
from workbench.analysis.circuits.stability import circuit_stability
from workbench.analysis.statistics.intervals import drawn_t, middle
from workbench.analysis.statistics.overlap import jaccard, weighted_jaccard
from workbench.analysis.statistics.p_values import among_draws

GRAPH = Graph.gpt2(6, 8, 64)
SMALL = Graph.gpt2(4, 6, 64)
DRAWS, SETS = 199, 20
LEVELS = (0.01, 0.05, 0.2, 0.5)
STRONG = "MLP edges three times as strong in both"

P_ROWS = (
    *((f"node effects {spread}", share, False) for spread in ("0.0", "0.5", "1.0", "1.5") for share in (0.05, 0.1)),
    *((STRONG, share, False) for share in (0.05, 0.1)),
    (f"node effects 1.0, {STRONG}", 0.1, False),
    *((f"node effects {spread}", 0.1, True) for spread in ("0.0", "0.5", "1.0")),
    (STRONG, 0.1, True),
    (f"node effects 1.0, {STRONG}", 0.1, True),
    ("shared 0.2", 0.05, False),
    ("shared 0.4", 0.05, False),
)


def scores(kind: str, generator: torch.Generator) -> Tensor:
    """[sender, receiver] sizes of independent random scores."""
    found = torch.randn(GRAPH.exists.shape, generator=generator, dtype=torch.float64).abs()
    if kind.endswith(STRONG):
        mlps = torch.tensor([name.startswith("m") for name in GRAPH.senders])
        found = torch.where(mlps[:, None], 3.0, 1.0) * found
    if kind.startswith("node effects"):
        spread = float(kind.removeprefix("node effects ").partition(",")[0])
        for axis, n in enumerate(found.shape):
            effects = (spread * torch.randn(n, generator=generator, dtype=torch.float64)).exp()
            found = found * effects.unsqueeze(1 - axis)
    return found


def top(found: Tensor, share: float, pruned: bool) -> Tensor:
    """[sender, receiver] bool: the edges of the highest scores."""
    flat = found.masked_fill(~GRAPH.exists, -1).flatten()
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.topk(int(share * GRAPH.n_edges)).indices] = True
    edges = chosen.view(found.shape)
    return GRAPH.pruned(edges) if pruned else edges


def pairs(kind: str, share: float, pruned: bool, n: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of circuits; of "shared x" with this share of their edges in common."""
    generator = torch.Generator().manual_seed(seed)
    while n:
        if kind.startswith("shared"):
            one, two = (scores("node effects 0.0", generator) for _ in range(2))
            common = torch.rand(one.shape, generator=generator) < float(kind.rpartition(" ")[2])
            two = torch.where(common, one, two)
        else:
            one, two = scores(kind, generator), scores(kind, generator)
        a, b = top(one, share, pruned), top(two, share, pruned)
        if bool(a.any()) and bool(b.any()):
            n -= 1
            yield a, b


@cache
def renamings(number: int) -> Tensor:
    """[draw, edge] one of a few sets of renamings, which pairs take in turn."""
    return torch.cat(list(Renamings.draw(GRAPH, DRAWS, number).of_edges()))


def renamed(a: Tensor, b: Tensor, seed: int) -> tuple[float, bool]:
    """The p-value of edges as `circuit_overlap` gives it, and whether the middle 95 % of chance hold the overlap."""
    mine, other = a[GRAPH.exists], b[GRAPH.exists]
    own, both = jaccard(mine, other), int(mine.sum()) + int(other.sum())
    shared = other[renamings(seed % SETS)[:, mine]].sum(1).double()
    null = shared / (both - shared)
    low, high = middle(null)
    return among_draws(null, own), bool(low - 1e-12 <= own <= high + 1e-12)


def p_row(number: int, n: int) -> dict[str, list[str]]:
    """One row of `P_ROWS`, by renamed heads and by degrees."""
    kind, share, pruned = P_ROWS[number]
    found = list(pairs(kind, share, pruned, n, number))
    by_names = [renamed(a, b, i) for i, (a, b) in enumerate(found)]
    by_degrees = [beyond_degrees(a, b, GRAPH, DRAWS, i) for i, (a, b) in enumerate(found)]
    start = [kind, f"{share:.0%}", "yes" if pruned else "no"]
    inside = sum(held for _, held in by_names) / n
    return {
        "edges: renamed": [*start, *_rates([p for p, _ in by_names]), f"{inside:.3f}"],
        "edges: degrees": [*start, *_rates(by_degrees), ""],
    }


def mass_rows(n: int) -> dict[str, list[list[str]]]:
    """p-values by the mass of scores of heads, and of heads and MLPs; and by membership, of circuits given whole."""
    heads = torch.tensor([GRAPH.sender_index[name] for name in GRAPH.head_names])
    every = torch.arange(len(GRAPH.senders))
    mlps = torch.tensor([name.startswith("m") for name in GRAPH.senders])
    rows: dict[str, list[list[str]]] = {"heads: renamed": [], "nodes: renamed": []}
    cases = (
        ("heads: renamed", heads, "mass", 0.5), ("heads: renamed", heads, "mass", 1.5),
        ("heads: renamed", heads, "members", 1.0), ("nodes: renamed", every, "mass", 1.0),
    )  # fmt: skip
    for seed, (row, items, what, spread) in enumerate(cases):
        generator = torch.Generator().manual_seed(100 + seed)
        found, inside = [], 0
        for i in range(n):
            both = (spread * torch.randn(2, len(every), generator=generator, dtype=torch.float64)).exp()
            both = torch.where(mlps, 3 * both, both)[:, items]
            if what == "members":
                both = (both >= both.quantile(0.75, dim=1, keepdim=True)).double()
            own = weighted_jaccard(*both) if what == "mass" else jaccard(both[0] > 0, both[1] > 0)
            (index,) = Renamings.draw(GRAPH, DRAWS, i).of_senders(items)
            one, moved = both[0] / both[0].sum(), (both[1] / both[1].sum())[index]
            null = torch.minimum(one, moved).sum(1) / torch.maximum(one, moved).sum(1)
            low, high = middle(null)
            found.append(among_draws(null, own))
            inside += bool(low - 1e-12 <= own <= high + 1e-12)
        kind = "scores" if what == "mass" else "members only"
        kind = f"{kind}, effects {spread}" + (", MLPs three times as strong in both" if items is every else "")
        rows[row].append([kind, "all" if what == "mass" else "25%", "no", *_rates(found), f"{inside / n:.3f}"])
    return rows


def _rates(found: list[float]) -> list[str]:
    p = torch.tensor(found, dtype=torch.float64)
    return [f"{float((p <= level + 1e-12).double().mean()):.3f}" for level in LEVELS]


def _truths(items: int, shared: float, generator: torch.Generator) -> Tensor:
    """[circuit, item] true scores of two circuits, with heavy tails, this share of them the same."""
    normal, tails = torch.randn(2, 2, items, generator=generator, dtype=torch.float64)
    one, other = normal * (1.2 * tails).exp()
    return torch.stack([one, torch.where(torch.rand(items, generator=generator) < shared, one, other)])


def _overlaps(scores: Tensor, size: int) -> dict[str, Tensor]:
    """By measure [...] of circuits of the highest |scores| [circuit, ..., item], as `circuit_overlap` measures them."""
    sizes = scores.abs()
    chosen = torch.zeros(sizes.shape, dtype=torch.bool).scatter_(-1, sizes.topk(size).indices, True)
    mass = sizes / sizes.sum(-1, keepdim=True)
    both = (chosen[0] & chosen[1]).sum(-1).double()
    return {
        "Jaccard": both / (2 * size - both),
        "share of one": both / size,
        "rank-biased": _rank_biased(sizes),
        "weighted": torch.minimum(*mass).sum(-1) / torch.maximum(*mass).sum(-1),
    }


def _rank_biased(sizes: Tensor, p: float = 0.9) -> Tensor:
    """`rank_biased` of many pairs [circuit, ..., item]: at depth d both hold what has no rank below d in either."""
    n = sizes.shape[-1]
    ranks = sizes.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    shared = torch.zeros(sizes.shape[1:], dtype=torch.float64)
    shared = shared.scatter_add_(-1, torch.maximum(*ranks), torch.ones_like(shared)).cumsum(-1)
    depth = torch.arange(1, n + 1, dtype=torch.float64)
    return shared[..., -1] / n * p**n + (1 - p) / p * (p**depth * shared / depth).sum(-1)


def interval_rows(items: int, size: int, samples: int) -> list[list[str]]:
    """How often intervals hold the mean overlap of circuits of `size` items from as many new prompts."""
    rows, several, n_draws = [], 20, 100  # true circuits in each row; draws for each interval
    for seed, (n, shared, noise) in enumerate(((12, 0.5, 2.0), (24, 0.0, 2.0), (24, 1.0, 2.0), (64, 0.5, 4.0))):
        generator = torch.Generator().manual_seed(seed)
        ends: dict[str, list[Tensor]] = {}
        for _ in range(several):
            truth = _truths(items, shared, generator)
            scale = noise * truth.abs().mean()
            new = torch.randn(2, 400, items, generator=generator, dtype=torch.float64)
            wanted = _overlaps(truth[:, None] + scale * n**-0.5 * new, size)
            for _ in range(samples // several):
                seen = truth[:, None] + scale * torch.randn(2, n, items, generator=generator, dtype=torch.float64)
                index = torch.randint(n, (2, n_draws, n), generator=generator)
                weights = torch.zeros(2, n_draws, n, dtype=torch.float64).scatter_add_(
                    2, index, torch.full(index.shape, 1 / n, dtype=torch.float64)
                )
                found, drawn = _overlaps(seen.mean(1), size), _overlaps(weights @ seen, size)
                for name, truth_of in wanted.items():
                    each = drawn_t(found[name], drawn[name], n) - truth_of.mean()
                    ends.setdefault(name, []).append(each)
        for name, each in ends.items():
            low, high = torch.stack(each).T
            held = float(((low <= 1e-9) & (high >= -1e-9)).double().mean())
            of = f"{name}, {size} of {items}; {shared:.0%} of the true scores shared, noise {noise:g}"
            rows.append([of, str(n), f"{held:.3f}", "1.00"])
    return rows


def circuit(examples: Tensor, size: int) -> Circuit:
    """The circuit of the `size` highest means of [example, sender] scores."""
    none: Any = torch.zeros(0, dtype=torch.float64)
    edges = torch.zeros_like(SMALL.exists)
    return Circuit(
        model=SMALL.facts, task="simulated", method="ablation", metric="", direction="", sign="", level="node",
        senders_in=edges.any(1), edges_in=edges, node_scores=examples.mean(0),
        edge_scores=torch.full(edges.shape, torch.nan, dtype=torch.float64), threshold={}, stages=(),
        examples=examples, clean=none, corrupted=none, settings={}, provenance={},
    ).top(size)  # fmt: skip


def stability_rows(samples: int) -> list[list[str]]:
    """Mean overlap of circuits from disjoint halves, from new prompts and from redrawn ones."""
    rows = []
    for seed, (n, noise) in enumerate(((12, 2.0), (24, 2.0), (64, 4.0))):
        generator = torch.Generator().manual_seed(50 + seed)
        below, new, above = [], [], []
        for i in range(samples):
            truth = _truths(len(SMALL.senders), 1.0, generator)[0]
            scale = noise * truth.abs().mean()
            noises = torch.randn(2, n, len(truth), generator=generator, dtype=torch.float64)
            one, other = (circuit(truth + scale * each, 6) for each in noises)
            found = circuit_stability(one, n_bootstrap=20, seed=i)
            below.append(float(found.halves.mean()))
            above.append(float(found.jaccard.mean()))
            new.append(jaccard(one.senders_in, other.senders_in))
        said = " / ".join(f"{sum(each) / samples:.2f}" for each in (below, new, above))
        rows.append([f"halves / new prompts / redrawn: {said}", str(n), "", ""])
    return rows
