"""Intervals of samples whose truth is known: how often they hold it, and how often there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from workbench.analysis.circuits.faithfulness import Faithfulness
from workbench.analysis.circuits.faithfulness_curve import MIB_FRACTIONS, FaithfulnessCurve
from workbench.analysis.circuits.shares import Denominator
from workbench.analysis.conditioning.curves import MEASURES, crossing, knees, measures, quality
from workbench.analysis.conditioning.experiments import curves_alike
from workbench.analysis.conditioning.stacks import simulate_stack
from workbench.analysis.cross_attention.result import corpus_area
from workbench.analysis.saliency.masks import Draw
from workbench.analysis.saliency.sums import Sums
from workbench.analysis.statistics.correlation import spearman
from workbench.analysis.statistics.intervals import (
    means_t,
    medians,
    proportions,
    rank_correlation,
    share_intervals,
)

SIZES = (8, 24, 64)
Rows = Iterator[list[str]]  # of, n, holds the truth, there is one


def covered(ends: Tensor, truth: float | Tensor) -> list[str]:
    """How often intervals [sample, 2] hold the truth, of those that are there, and how often one is."""
    there = ends.isfinite().all(-1)
    held = (ends[..., 0] <= truth + 1e-9) & (truth - 1e-9 <= ends[..., 1])
    return [f"{float(held[there].double().mean()):.3f}", f"{float(there.double().mean()):.2f}"]


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int) -> Tensor:
    """Numbers between 0 and 1 in float64."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(samples: int) -> Rows:
    """Student's t."""
    for n in SIZES:
        z = normal(samples, n, seed=n)
        yield ["normal: effects, correlations", str(n), *covered(means_t(z), 0.0)]
        skewed = uniform(samples, n, seed=n).square()
        yield ["skewed, from 0 to 1: mass, entropy, strength", str(n), *covered(means_t(skewed), 1 / 3)]
        lacking = z.masked_fill(uniform(samples, n, seed=n + 1) < 0.3, torch.nan)
        yield ["normal, 30 % undefined", str(n), *covered(means_t(lacking), 0.0)]


def median(samples: int) -> Rows:
    """Order statistics, of what few examples carry."""
    for n in SIZES:
        yield ["lognormal, σ = 3", str(n), *covered(medians((3 * normal(samples, n, seed=n)).exp())[:, 1:], 1.0)]


def proportion(samples: int) -> Rows:
    """Clopper and Pearson."""
    for n in (24, 100):
        for chance in (0.5, 0.9, 0.99):
            right = (uniform(samples, n, seed=n) < chance).double()
            yield [f"right in {chance:.0%} of all prompts", str(n), *covered(proportions(right), chance)]


def _shares(samples: int, n: int, times: float, seed: int) -> tuple[Tensor, Tensor]:
    """[sample, example] of a part of .7 and of the whole, whose mean is `times` standard errors above 0."""
    whole = 1 + n**0.5 / times * normal(samples, n, seed=seed)
    return 0.7 * whole + 0.5 * normal(samples, n, seed=seed + 1), whole


def share(samples: int) -> Rows:
    """Fieller's, as `Faithfulness` and `HeadPatching` have it."""
    for n in SIZES:
        for times in (2.0, 3.0, 10.0):
            part, whole = _shares(samples, n, times, seed=n)
            none = torch.zeros(n, dtype=torch.float64)
            ends = torch.tensor(
                [Denominator.of(w, none, 1).interval(p, w, none) for p, w in zip(part, whole, strict=True)]
            )
            yield [f"denominator {times:g} standard errors", str(n), *covered(ends, 0.7)]
    heads = normal(samples, 3, 24, seed=5) + torch.tensor([0.0, 0.5, 2.0])[None, :, None]
    gap = 1 + normal(samples, 24, seed=6)
    ends = torch.stack([share_intervals(h, g) for h, g in zip(heads, gap, strict=True)])
    for at, truth in enumerate((0.0, 0.5, 2.0)):
        yield [f"score of patching a head, {truth:g}", "24", *covered(ends[:, at], truth)]


def size_of_a_share(samples: int) -> Rows:
    """|F(circuit without K) − F(model without K)|, as `Faithfulness.table` has it."""
    for truth in (0.0, 0.3):
        ends = []
        for i in range(samples):
            z = normal(4, 24, seed=i)
            full = 1 + 0.5 * z[0]
            found = Faithfulness(
                circuit="", task="", metric="", ablation="", alone=full, full=full, none=torch.zeros(24).double(),
                subsets=(("a0.h0",),), without=(0.5 + 0.5 * z[1])[None],
                alone_without=(0.5 - truth + 0.5 * z[1] + 0.2 * z[2])[None], members=(), minus_one=torch.zeros(0, 24),
                provenance={},
            )  # fmt: skip
            ends.append(found.table.iloc[1][["low", "high"]].tolist())
        yield [f"incompleteness of {truth:g}", "24", *covered(torch.tensor(ends, dtype=torch.float64), truth)]


def area_under_shares(samples: int) -> Rows:
    """CPR, and faithfulness at one size, as `FaithfulnessCurve` has them."""
    rising = torch.linspace(0, 1, len(MIB_FRACTIONS), dtype=torch.float64)
    steps = torch.tensor(MIB_FRACTIONS, dtype=torch.float64).diff()
    truth = float((steps * (rising[1:] + rising[:-1]) / 2).sum())
    for n in SIZES:
        areas, points = [], []
        for i in range(samples):
            full = 1 + 0.5 * normal(n, seed=1000 * n + i)
            each = rising[:, None] * full + 0.2 * normal(2, len(rising), n, seed=i)
            found = FaithfulnessCurve(
                circuit="", task="", metric="", ablation="", level="edge", fractions=MIB_FRACTIONS,
                sizes=tuple(range(10)), kept_absolute=tuple(range(10)), kept_signed=tuple(range(10)), examples=each,
                full=full, none=torch.zeros(n, dtype=torch.float64), provenance={},
            )  # fmt: skip
            areas.append(found.cpr_interval)
            points.append(found.intervals(0)[4])
        yield ["CPR", str(n), *covered(torch.tensor(areas, dtype=torch.float64), truth)]
        yield ["f at one size", str(n), *covered(torch.tensor(points, dtype=torch.float64), float(rising[4]))]


def area_of_a_corpus(samples: int) -> Rows:
    """Jackknife, of the ratio of errors to words at each share of cells, at most 100 %."""
    steps = torch.linspace(0, 1, 21, dtype=torch.float64)

    def drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, 30, (n,), generator=generator).double()
        hard = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        rates = (steps * (0.6 + 1.2 * hard)).clamp(max=1.1)  # words that are put in make more than all wrong
        noisy = (words[:, None] * rates + 0.7 * torch.randn(n, 21, generator=generator, dtype=torch.float64)).round()
        return noisy.clamp(min=0)[:, None, None], words

    errors, words = drawn(200_000, 0)
    truth = _area(errors, words, steps)
    for n in SIZES:
        ends = torch.stack([corpus_area(*drawn(n, i + 1), steps, 0.95)[1][0, 0] for i in range(samples)])
        yield ["word error rate of a corpus, by share of cells", str(n), *covered(ends, truth)]


def _area(errors: Tensor, words: Tensor, steps: Tensor) -> float:
    return float(torch.trapezoid((100 * errors.sum(0) / words.sum()).clamp(max=100), steps)[0, 0])


def _retrievals(samples: int, repeats: int, seed: int) -> tuple[Tensor, tuple[int, ...]]:
    """[sum, sample, n, repeat]: a memory of Hebb's kind with 24 dimensions, 16 questions to each draw of pairs."""
    sizes, generator = (2, 4, 8, 16, 32, 64), torch.Generator().manual_seed(seed)
    n = torch.tensor(sizes, dtype=torch.float64)

    def z(*shape: int) -> Tensor:
        return torch.randn(samples, len(sizes), repeats, *shape, generator=generator, dtype=torch.float64)

    level = ((n - 1) / 24).sqrt()[None, :, None] * (0.2 * z()).exp()  # draws differ in how alike their keys are
    v = z(16, 8)
    r = v + level[..., None, None] * z(16, 8)
    cosine = torch.nn.functional.cosine_similarity(r, v, dim=-1)
    hits = (
        torch.rand(cosine.shape, generator=generator, dtype=torch.float64) < 1 / (1 + level[..., None] ** 2)
    ).double()
    sums = [(r * v).sum(-1), r.square().sum(-1), v.square().sum(-1), cosine, hits, torch.ones_like(hits)]
    return torch.stack([each.sum(-1) for each in sums]), sizes


@cache
def capacity(samples: int) -> list[tuple[str, list[str]]]:
    """Jackknife over draws of pairs, as `Capacity` has it."""
    rows = []
    many, sizes = _retrievals(400, 64, seed=1)
    truth = measures(many.sum((1, 3)))
    n_true = float(crossing(quality(truth, "snr_db", 0.0)[0], sizes, -1.0)[0])
    for repeats in (8, 32):
        found = [knees(_retrievals(100, repeats, seed=10 + i)[0], sizes, "snr_db", 0.0) for i in range(samples // 200)]
        low, high = (torch.cat([getattr(one, name) for one in found], 1) for name in ("low", "high"))
        for m, name in enumerate(MEASURES):
            for at in (1, 4):
                ends = torch.stack([low[m, :, at], high[m, :, at]], -1)
                said = [f"{name} of {sizes[at]} pairs", str(repeats), *covered(ends, truth[m, at])]
                rows.append(("capacity curve", said))
        ends = torch.stack([torch.cat([getattr(one, name) for one in found]) for name in ("n_low", "n_high")], -1)
        rows.append(("n*", [f"n* at 0 dB, {n_true:.1f}", str(repeats), *covered(ends, n_true)]))
    return rows


def capacity_curve(samples: int) -> Rows:
    """The curves' rows."""
    return (row for name, row in capacity(samples) if name == "capacity curve")


def n_star(samples: int) -> Rows:
    """n*'s rows."""
    return (row for name, row in capacity(samples) if name == "n*")


def correlation_of_curves(samples: int) -> Rows:
    """Jackknife of Fisher's z over choices of cues, as `Conditioning` has it."""
    t = torch.linspace(0, 1, 36, dtype=torch.float64)
    one, other = t.sqrt(), t.square() + 0.1 * (20 * t).sin()
    apart = [each - each.mean() for each in (one, other)]
    truth = float((apart[0] * apart[1]).sum() / (apart[0].norm() * apart[1].norm()))
    for repeats in (16, 64):
        ends = []
        for i in range(samples // 2):
            z = normal(2, 36, repeats, seed=i)
            level = normal(2, 1, repeats, seed=i + 10**6)  # a choice of cues is higher or lower in all trials
            found = curves_alike(
                one[:, None] + 0.3 * z[0] + 0.2 * level[0], other[:, None] + 0.3 * z[1] + 0.2 * level[1]
            )
            ends.append(found[1:])
        yield [f"r of {truth:.2f}", str(repeats), *covered(torch.tensor(ends, dtype=torch.float64), truth)]


def correlation_of_ranks(samples: int) -> Rows:
    """Fisher's z for Spearman's ρ."""
    for n in (8, 16, 48):
        for r in (0.0, 0.5, 0.9):
            x, noise = normal(2, samples, n, seed=n)
            rho = spearman(x, r * x + (1 - r * r) ** 0.5 * noise)
            truth = float(6 / torch.pi * torch.tensor(r / 2).asin())
            ends = torch.tensor([rank_correlation(one, n) for one in rho.tolist()], dtype=torch.float64)
            yield [f"normal pairs, ρ {truth:.2f}", str(n), *covered(ends, truth)]


def standard_error(samples: int) -> Rows:
    """± 1.96 of the standard errors that stand without an interval."""
    weights = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0], dtype=torch.float64)
    every = torch.tensor([[i >> j & 1 for j in range(5)] for i in range(32)], dtype=torch.float64)

    def score(hidden: Tensor) -> Tensor:
        return hidden.double() @ weights + 1.5 * (hidden[:, 0] * hidden[:, 1]).double()

    truth = torch.stack([score(every)[every[:, j] == 1].mean() for j in range(5)])
    for n in (128, 600):
        ends = []
        for i in range(samples // 2):
            hidden = uniform(n, 5, seed=1000 * n + i) < 0.5
            sums = Sums.empty(1, [5])
            sums.add(Draw(0, hidden, torch.ones(n, dtype=torch.float64)), score(hidden)[:, None])
            found, error = sums.maps([torch.arange(5)], exact=False)
            ends.append(torch.stack([found[0] - 1.96 * error[0], found[0] + 1.96 * error[0]], -1))
        yield ["a cell of a saliency map, by random masks", str(n), *covered(torch.stack(ends), truth)]
    for trials in (1000, 10_000):
        found = [simulate_stack(0.3, 4, 3, trials=trials, seed=i) for i in range(samples // 10)]
        ends = torch.tensor([(one.simulated - 1.96 * one.error, one.simulated + 1.96 * one.error) for one in found])
        yield ["chance that a stack fails", str(trials), *covered(ends.double(), found[0].exact)]
    effects = normal(samples, 24, seed=3)
    wide = 1.96 * effects.std(1) / 24**0.5
    ends = torch.stack([effects.mean(1) - wide, effects.mean(1) + wide], -1)
    yield ["effect of patching a head", "24", *covered(ends, 0.0)]


INTERVALS: dict[str, Callable[[int], Rows]] = {
    "mean": mean, "median": median, "proportion": proportion, "share": share, "size of a share": size_of_a_share,
    "area under shares": area_under_shares, "corpus area": area_of_a_corpus, "capacity curve": capacity_curve,
    "n*": n_star, "correlation of curves": correlation_of_curves, "rank correlation": correlation_of_ranks,
    "standard error": standard_error,
}  # fmt: skip
