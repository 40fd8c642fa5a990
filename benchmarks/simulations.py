"""Whether p-values are uniform and intervals hold what they promise, where the truth is known.

Overlap: pairs of circuits from independent random scores on the graph of a model of 6 layers and 8 heads, in which
nodes have effects or kinds of edges differ, pruned or not; and pairs that share a part of their edges. Intervals: of
means, medians and shares of samples from known distributions. Writes docs/simulations.md.

    python benchmarks/simulations.py [--pairs 400] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.overlap_null import Renamings, beyond_degrees
from workbench.analysis.circuits.shares import Denominator
from workbench.analysis.statistics.intervals import means_t, medians, share_interval
from workbench.analysis.statistics.overlap import jaccard

PAGE = Path(__file__).parents[1] / "docs" / "simulations.md"
GRAPH = Graph.gpt2(6, 8, 64)
DRAWS = 199


def scores(kind: str, generator: torch.Generator) -> Tensor:
    """[sender, receiver] sizes of independent random scores."""
    found = torch.randn(GRAPH.exists.shape, generator=generator, dtype=torch.float64).abs()
    if kind == "MLP edges three times as strong in both":
        mlps = torch.tensor([name.startswith("m") for name in GRAPH.senders])
        return torch.where(mlps[:, None], 3.0, 1.0) * found
    spread = float(kind.rpartition(" ")[2])
    sending, receiving = (
        (spread * torch.randn(n, generator=generator, dtype=torch.float64)).exp() for n in GRAPH.exists.shape
    )
    return found * sending[:, None] * receiving


def top(found: Tensor, share: float, pruned: bool) -> Tensor:
    """[sender, receiver] bool: the edges of the highest scores."""
    flat = found.masked_fill(~GRAPH.exists, -1).flatten()
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(descending=True)[: int(share * GRAPH.n_edges)]] = True
    edges = chosen.view(found.shape)
    return GRAPH.pruned(edges) if pruned else edges


def renamed_p(a: Tensor, b: Tensor, seed: int) -> float:
    """As `circuit_overlap` gives it."""
    exists = GRAPH.exists
    mine, other, own = a[exists], b[exists], jaccard(a[exists], b[exists])
    reached = 0
    for index in Renamings.draw(GRAPH, DRAWS, seed).of_edges():
        moved = other[index]
        reached += int(((mine & moved).sum(1) / (mine | moved).sum(1) >= own - 1e-12).sum())
    return (1 + reached) / (1 + DRAWS)


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


def overlap_rows(n: int) -> list[list[str]]:
    """How often p is at most 0.05 and 0.01."""
    rows = []
    kinds = ["node effects 0.0", "node effects 0.5", "node effects 1.0", "MLP edges three times as strong in both"]
    for seed, (kind, share, pruned) in enumerate(
        [*((kind, share, False) for kind in kinds for share in (0.05, 0.1)), *((kind, 0.1, True) for kind in kinds),
         ("shared 0.2", 0.05, False), ("shared 0.4", 0.05, False)]
    ):  # fmt: skip
        found = list(pairs(kind, share, pruned, n, seed))
        renamed = torch.tensor([renamed_p(a, b, i) for i, (a, b) in enumerate(found)])
        degrees = torch.tensor([beyond_degrees(a, b, GRAPH, DRAWS, i) for i, (a, b) in enumerate(found)])
        cells = [f"{float((p <= limit).double().mean()):.3f}" for p in (renamed, degrees) for limit in (0.05, 0.01)]
        rows.append([kind, f"{share:.0%}", "yes" if pruned else "no", *cells])
    return rows


def interval_rows(n: int) -> list[list[str]]:
    """How often 95 % intervals hold the truth, and how often there is one."""
    rows, generator = [], torch.Generator().manual_seed(0)
    for size in (8, 24, 64):
        normal = torch.randn(n, size, generator=generator, dtype=torch.float64)
        low, high = means_t(normal).T
        rows.append(["mean, Student's t", "normal", str(size), _covers(low, high, 0.0), "1.00"])
        heavy = (3 * normal).exp()
        _, low, high = medians(heavy).T
        rows.append(["median, order statistics", "lognormal, σ = 3", str(size), _covers(low, high, 1.0), "1.00"])
        for times in (2, 3, 10):
            spread = size**0.5 / times
            whole = 1 + spread * torch.randn(n, size, generator=generator, dtype=torch.float64)
            part = 0.7 * whole + 0.5 * torch.randn(n, size, generator=generator, dtype=torch.float64)
            ends = torch.tensor([share_interval(a, b) for a, b in zip(part, whole, strict=True)])
            defined = torch.tensor([Denominator.of(b, torch.zeros_like(b), 1).defined for b in whole])
            covered = _covers(*ends[defined].T, 0.7)
            rows.append(["share, Fieller", f"denominator {times} standard errors", str(size), covered,
                         f"{float(defined.double().mean()):.2f}"])  # fmt: skip
    return rows


def _covers(low: Tensor, high: Tensor, truth: float) -> str:
    return f"{float(((low <= truth) & (truth <= high)).double().mean()):.3f}"


def written(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines)


def main() -> None:
    """Simulate, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="few of each, and nothing is written")
    options = parser.parse_args()
    n, samples = (10, 50) if options.quick else (options.pairs, options.samples)
    overlap = written(
        ["scores", "size", "pruned", "renamed: p ≤ .05", "p ≤ .01", "degrees: p ≤ .05", "p ≤ .01"], overlap_rows(n)
    )
    covered = written(["interval", "of", "n", "holds the truth", "there is one"], interval_rows(samples))
    text = f"""# Simulations

Made by `python benchmarks/simulations.py`, with its seeds. What the words mean is in [circuits.md](circuits.md).

## p-values of overlap

{n} pairs of circuits for each row, {DRAWS} draws for each p, on the graph of a model of 6 layers of 8 heads
({GRAPH.n_edges:,} edges). Scores are independent in all rows but the last two, so that a p-value should be at most
.05 in .05 of the pairs; node effects are log-normal factors on all edges of a sender and of a receiver, of the spread
that is given, drawn anew for each circuit. In the last two rows a share of the edges is the same in both, which should
be found.

{overlap}

## Intervals at 95 %

{samples} samples for each row. Shares have the true value .7, and a denominator whose mean is as many standard errors
above 0 as is given; coverage is of the samples in which there is an interval: the denominator's own does not hold 0.

{covered}
"""
    if options.quick:
        print(text)
        return
    PAGE.write_text(text)
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
