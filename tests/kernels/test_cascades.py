"""Passes of attention's algorithms: what the counter finds is how often programs of these equations read each key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from workbench import CaptureError
from workbench.kernels import CASCADES, Cascade, Equation, compare, passes
from workbench.kernels.statistics.record import STATISTICS

BLOCK, N = 8, 37


class Keys:
    """Keys and values that count how often each block of keys is read; scores are made anew in each pass."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.q, self.k, self.v = (torch.randn(n, 5, generator=random, dtype=torch.float64) for n in (3, N, N))
        self.reads = torch.zeros(N, dtype=torch.long)

    def blocks(self) -> list[slice]:
        return [slice(start, min(start + BLOCK, N)) for start in range(0, N, BLOCK)]

    def scores(self, block: slice) -> Tensor:
        self.reads[block] += 1
        return self.q @ self.k[block].mT

    def truth(self) -> Tensor:
        return (self.q @ self.k.mT).softmax(-1) @ self.v


def _three(keys: Keys) -> Tensor:
    top = torch.stack([keys.scores(b).amax(1) for b in keys.blocks()]).amax(0)
    denominator = sum((keys.scores(b) - top[:, None]).exp().sum(1) for b in keys.blocks())
    return sum(((keys.scores(b) - top[:, None]).exp() / denominator[:, None]) @ keys.v[b] for b in keys.blocks())


def _deferred(keys: Keys) -> Tensor:
    top = torch.stack([keys.scores(b).amax(1) for b in keys.blocks()]).amax(0)
    denominator, numerator = torch.zeros(3).double(), torch.zeros(3, 5).double()
    for b in keys.blocks():
        weight = (keys.scores(b) - top[:, None]).exp()
        denominator, numerator = denominator + weight.sum(1), numerator + weight @ keys.v[b]
    return numerator / denominator[:, None]


def _two(keys: Keys) -> Tensor:
    tops, sums = [], []
    for b in keys.blocks():
        scores = keys.scores(b)
        tops.append(scores.amax(1))
        sums.append((scores - tops[-1][:, None]).exp().sum(1))
    correction = (torch.stack(tops) - torch.stack(tops).amax(0)).exp()
    denominator = (correction * torch.stack(sums)).sum(0)
    parts = (
        ((keys.scores(b) - tops[i][:, None]).exp() * (correction[i] / denominator)[:, None]) @ keys.v[b]
        for i, b in enumerate(keys.blocks())
    )
    return sum(parts)


def _one(keys: Keys) -> Tensor:
    top, denominator, numerator = torch.full((3,), -torch.inf).double(), torch.zeros(3), torch.zeros(3, 5)
    for b in keys.blocks():
        scores = keys.scores(b)
        higher = torch.maximum(top, scores.amax(1))
        correction, weight = (top - higher).exp(), (scores - higher[:, None]).exp()
        denominator = correction * denominator + weight.sum(1)
        numerator = correction[:, None] * numerator + weight @ keys.v[b]
        top = higher
    return numerator / denominator[:, None]


PROGRAMS = {"three passes": _three, "deferred division": _deferred, "two passes": _two, "one pass": _one}


@pytest.mark.parametrize("name", CASCADES)
def test_the_program_of_a_cascade_reads_each_key_as_often_as_the_counter_says(name: str) -> None:
    keys = Keys()
    program: Callable[[Keys], Tensor] = PROGRAMS[name]
    torch.testing.assert_close(program(keys), keys.truth(), atol=1e-12, rtol=1e-12)
    assert keys.reads.unique().tolist() == [CASCADES[name].passes]


def test_what_each_pass_makes_and_what_is_kept_for_a_later_one() -> None:
    three, two, one = (CASCADES[name] for name in ("three passes", "two passes", "one pass"))
    assert [three.made_in(name) for name in ("score", "top", "weight", "denominator", "a", "z")] == [1, 1, 2, 2, 3, 3]
    assert three.kept == ["score", "weight"]
    assert two.kept == ["block_weight"]
    assert [two.made_in(name) for name in ("block_sum", "correction", "z")] == [1, 2, 2]
    assert one.kept == []
    with pytest.raises(CaptureError, match='no "lse"'):
        one.made_in("lse")


@pytest.mark.parametrize("name", sorted(n for n, s in STATISTICS.items() if s.of_pattern is None))
def test_with_a_statistic_the_best_algorithm_takes_as_many_passes_as_the_plan(name: str) -> None:
    assert CASCADES["one pass"].also(name).passes == passes([name]).needed
    assert CASCADES["three passes"].also(name).passes == 3  # the weights are there


def test_no_more_than_one_pass_is_added_however_many_statistics_need_it() -> None:
    whole = CASCADES["one pass"].also("received", "entropy", "received_mean")
    assert whole.passes == passes(["received", "entropy", "received_mean"]).needed == 2
    assert whole.made_in("entropy") == 1
    assert whole.kept == ["weight"]


def test_an_algorithm_of_ones_own_is_counted() -> None:
    without_top = (
        Equation("weight", "keys", ("q", "k"), "weight_j = exp(q·k_j)"),
        Equation("denominator", "row", ("weight",), "denominator = Σ_j weight_j"),
        Equation("numerator", "row", ("weight", "v"), "numerator = Σ_j weight_j v_j"),
        Equation("z", "row", ("numerator", "denominator"), "z = numerator / denominator"),
    )
    own = Cascade("no maximum", without_top)
    assert own.passes == 1
    assert own.also("received").passes == 2
    assert "1 pass over the keys" in repr(own)
    assert Cascade("nothing", ()).passes == 0
    with pytest.raises(CaptureError, match="has no weights"):
        Cascade("nothing", ()).also("entropy")


def test_equations_that_cannot_be_computed_are_named() -> None:
    with pytest.raises(CaptureError, match='"b" reads "a", which is not there'):
        Cascade("early", (Equation("b", "keys", ("a",), ""), Equation("a", "keys", ("k",), "")))
    with pytest.raises(CaptureError, match='"a" reads "a"'):
        Cascade("itself", (Equation("a", "keys", ("k", "a"), ""),))
    with pytest.raises(CaptureError, match='"k" is there twice'):
        Cascade("twice", (Equation("k", "keys", ("q",), ""),))


def test_algorithms_are_compared_beside_statistics() -> None:
    table = compare(["entropy", "received"]).set_index("algorithm")
    assert table["passes"].to_dict() == {name: each.passes for name, each in CASCADES.items()}
    assert table.loc["one pass", ["entropy", "received"]].tolist() == [1, 2]
    assert table.loc["three passes", "kept"] == "score, weight"
