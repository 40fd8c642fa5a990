"""Intervals hold what they are of as often as they say, and where they cannot there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import workbench
from support.tiny import family, make
from workbench.analysis.statistics.intervals import draws, effective_examples, halves, means_t, medians, percentiles


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
    low, high = percentiles(torch.tensor([[torch.nan, 1.0], [torch.nan, 2.0], [torch.nan, torch.inf]]))
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
    assert "no interval of 1" in repr(found)
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
