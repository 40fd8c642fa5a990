"""Intervals hold what they are of as often as they say, and where they cannot there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import workbench
from support.tiny import family, make
from workbench.analysis.statistics.intervals import (
    drawn_t,
    draws,
    effective_examples,
    halves,
    jackknife_t,
    means_t,
    medians,
    middle,
    proportions,
    rank_correlation,
    share_interval,
    share_intervals,
)  # fmt: skip


@pytest.mark.parametrize("n", [8, 24])
def test_means_and_medians_are_covered(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    normal = torch.randn(2000, n, generator=generator, dtype=torch.float64)
    low, high = means_t(normal).T
    assert 0.93 < float(((low <= 0) & (high >= 0)).double().mean()) < 0.97
    heavy = (3 * normal).exp()  # lognormal: the median is 1, the mean 90
    middle, low, high = medians(heavy).T
    assert float(((low <= 1) & (high >= 1)).double().mean()) > 0.94
    torch.testing.assert_close(middle, heavy.quantile(0.5, dim=1))
    low, high = means_t(heavy).T
    mean = torch.tensor(4.5, dtype=torch.float64).exp()
    assert float(((low <= mean) & (high >= mean)).double().mean()) < 0.8


def test_too_few_examples_have_no_interval() -> None:
    assert means_t(torch.ones(3, 1)).isnan().all()
    assert medians(torch.rand(3, 5))[:, 1:].isnan().all()
    assert medians(torch.rand(3, 6)).isfinite().all()
    low, high = middle(torch.tensor([[torch.nan, 1.0], [torch.nan, 2.0], [torch.nan, torch.inf]]))
    assert low[0].isnan()
    assert (float(low[1]), float(high[1])) == (1.0, torch.inf)


def test_a_mean_that_few_examples_carry_has_no_interval() -> None:
    ids = torch.randint(3, 60, (30, 6), generator=torch.Generator().manual_seed(0))
    with workbench.attach(make(family("llama-gqa"))) as wb:
        found = workbench.head_importance(
            wb, [{"input_ids": ids}], heads=["L0H0", "L0H1"], methods="zero", progress=False
        )
    even, heavy = torch.randn(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    heavy = heavy / 100
    heavy[7] = 100.0
    found = replace(found, scores={("zero", "loss"): torch.stack([even + 3, heavy])})
    ends = found.interval()
    torch.testing.assert_close(ends[0], means_t(even + 3))
    assert ends[1].isnan().all()
    assert found.effective()[1] == pytest.approx(1, abs=0.1)
    assert "no interval of 1 of 2 means, which few examples carry: see median" in repr(found)
    row = found.table.iloc[1]
    assert (row["largest_example"], round(row["largest_share"])) == (7, 1)
    assert row["median_low"] <= row["median"] <= row["median_high"] < 1


def test_draws_and_halves_keep_groups_together() -> None:
    groups = ["a", "b", "a", "c", "c", "d"]
    for index in draws(6, 20, 0, groups):
        counts = torch.bincount(index, minlength=6)
        assert counts[0] == counts[2]
        assert counts[3] == counts[4]
    for one, other in halves(6, 20, 0, groups):
        assert not set(one.tolist()) & set(other.tolist())
        assert {groups[i] for i in one} & {groups[i] for i in other} == set()
    assert [len(index) for index in draws(9, 2, 0, share=0.5)] == [4, 4]
    assert effective_examples(torch.ones(2, 5)).tolist() == [5, 5]


def held(ends: torch.Tensor, truth: float) -> float:
    return float(((ends[..., 0] <= truth) & (truth <= ends[..., 1])).double().mean())


def test_means_leave_out_what_is_undefined() -> None:
    values = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gaps = values.clone()
    gaps[:, 3:5] = torch.nan
    torch.testing.assert_close(means_t(gaps), means_t(values[:, [0, 1, 2, 5, 6, 7, 8]]))


def test_accuracies_are_covered_near_1_too() -> None:
    generator = torch.Generator().manual_seed(0)
    for chance in (0.5, 0.9, 0.99):
        right = (torch.rand(2000, 24, generator=generator, dtype=torch.float64) < chance).double()
        assert held(proportions(right), chance) > 0.94
    assert proportions(torch.ones(24))[0] < 0.9
    assert proportions(torch.zeros(24)).tolist()[0] == 0


def test_ratios_of_sums_are_covered_by_leaving_one_out() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = 1 + torch.rand(2000, 20, generator=generator, dtype=torch.float64)
    part = 0.3 * whole * (1 + 0.5 * torch.randn(2000, 20, generator=generator, dtype=torch.float64))
    without = [each.sum(-1, keepdim=True) - each for each in (part, whole)]
    assert 0.93 < held(jackknife_t(part.sum(-1) / whole.sum(-1), without[0] / without[1]), 0.3) < 0.97
    assert jackknife_t(part[0, 0], part[:1, 0]).isnan().all()


def test_rank_correlations_are_covered() -> None:
    from workbench.analysis.statistics.correlation import spearman

    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 1000, 16, generator=generator, dtype=torch.float64)
    truth = 6 / torch.pi * float(torch.tensor(0.3).asin())  # of normal pairs that correlate by 0.6
    ends = torch.tensor([rank_correlation(rho, 16) for rho in spearman(x, 0.6 * x + 0.8 * noise).tolist()])
    assert 0.93 < held(ends, truth) < 0.975
    for rho in (1.0, -1.0):  # the ends are on both sides of what was found, to the last bit
        low, high = rank_correlation(rho, 9)
        assert -1 <= low <= rho <= high <= 1


def test_shares_of_several_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    parts, whole = torch.randn(4, 12, generator=generator), 2 + torch.randn(12, generator=generator)
    for ends, part in zip(share_intervals(parts, whole), parts, strict=True):
        assert ends.tolist() == pytest.approx(share_interval(part, whole))
    assert share_intervals(parts, whole - 2).isnan().all()


def test_draws_give_the_width_and_not_the_place() -> None:
    drawn = torch.tensor([[0.1, torch.nan], [0.3, torch.nan], [0.5, 1.0]])
    ends = drawn_t(torch.tensor([0.6, 1.0]), drawn, n=10)
    assert ends[0].mean() == pytest.approx(0.6)
    assert float(ends[0, 1] - ends[0, 0]) == pytest.approx(2 * 2.262 * 0.2, rel=1e-3)
    assert ends[1].isnan().all()
