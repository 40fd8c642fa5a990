"""The theory's formulas against simulations of what they assume."""

from __future__ import annotations

import itertools

import pytest
import torch

from workbench.analysis.conditioning import memory, simulate_stack, theory
from workbench.analysis.conditioning.geometry import effective_dimension, geometry, mean_overlap
from workbench.errors import WorkbenchError


def sphere(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("d_v", [1, 16])
@pytest.mark.parametrize(
    ("d_k", "n", "power"), [(64, 33, 0.500), (128, 17, 0.125), (256, 128, 0.49609375), (1, 9, 8.0)]
)
def test_interference_power(d_k, n, power, d_v):
    assert theory.interference_power(n, d_k) == pytest.approx(power)
    k, v = sphere(400, n, d_k), sphere(400, n, d_v, seed=1)
    held = memory("hebb", d_k, d_v, (400,), dtype=torch.float64)
    held.write(k, v)
    noise = ((held.read(k[:, 0]) - v[:, 0]) ** 2).sum(-1)
    assert noise.mean().item() == pytest.approx(power, abs=4 * noise.std().item() / 20)
    assert theory.snr(n, d_k) == pytest.approx(1 / power)
    assert theory.average_capacity(d_k, theory.snr(n, d_k)) == pytest.approx(n)


def test_worst_case_bound_holds_and_is_far_off():
    """d_k = 256, δ = 1, n = 5: the bound says 0.078, and no item fails in 2000 trials."""
    assert theory.union_bound(5, 256) == 0.078125
    assert theory.worst_capacity(256, 1.0, 0.1) == pytest.approx(5.0596, abs=1e-4)
    k, v = sphere(2000, 5, 256), sphere(2000, 5, 8, seed=1)
    noise = k @ k.transpose(1, 2) @ v - v
    assert not ((noise**2).sum(-1) >= 1).any()
    assert theory.failure_bound(40, 64) == pytest.approx(39 / 64)
    k, v = sphere(300, 40, 64), sphere(300, 40, 8, seed=1)
    noise = ((k @ k.transpose(1, 2) @ v - v) ** 2).sum(-1)
    assert 0 < (noise[:, 0] >= 1).double().mean() < 39 / 64


@pytest.mark.parametrize("lag", [0, 3])
def test_retention_under_decay(lag):
    decay, d_k, n = 0.8, 32, 60  # 0.8^120 is nothing: the stream is as good as endless
    k, v = sphere(3000, n, d_k), sphere(3000, n, 4, seed=1)
    held = memory("decay", d_k, 4, (3000,), decay=decay, dtype=torch.float64)
    held.write(k, v)
    at = n - 1 - lag
    rest = held.read(k[:, at]) - theory.retained_signal(lag, decay) * v[:, at]
    power = (rest**2).sum(-1)
    wanted = theory.retention_noise(lag, decay, d_k)
    assert power.mean().item() == pytest.approx(wanted, abs=4 * power.std().item() / 3000**0.5)
    assert theory.retention_snr(lag, decay, d_k) == pytest.approx(decay ** (2 * lag) / wanted)


def test_memory_span_is_where_the_snr_falls_to_the_threshold():
    span = theory.memory_span(0.9, 64, 2.0)
    assert theory.retention_snr(span, 0.9, 64) == pytest.approx(2.0)
    assert theory.retention_snr(span + 1, 0.9, 64) < 2.0
    with pytest.raises(WorkbenchError, match="decay is 1"):
        theory.memory_span(1.0, 64)


@pytest.mark.parametrize(("p", "depth", "heads"), [(0.5, 3, 2), (0.3, 6, 1), (0.7, 12, 4)])
def test_stacks_fail_as_the_formula_says(p, depth, heads):
    found = simulate_stack(p, depth, heads, trials=20_000)
    assert found.exact == pytest.approx(theory.stack_failure(p, depth, heads))
    assert found.linear == pytest.approx(theory.stack_failure_linear(p, depth, heads))
    assert found.simulated == pytest.approx(found.exact, abs=4 * found.error)
    assert found.linear >= found.exact


@pytest.mark.parametrize(("depth", "heads", "needed"), [(1, 3, 1), (3, 2, 1), (2, 4, 2), (4, 2, 2)])
def test_the_formula_is_the_sum_over_all_outcomes(depth, heads, needed):
    """No chance: every way in which the heads of a stack can fail, with its probability."""
    for p in (0.0, 0.1, 0.5, 0.93, 1.0):
        wanted = 0.0
        for fails in itertools.product((0, 1), repeat=depth * heads):
            layers = torch.tensor(fails).view(depth, heads)
            if bool((heads - layers.sum(-1) < needed).any()):
                wanted += p ** sum(fails) * (1 - p) ** (depth * heads - sum(fails))
        assert theory.redundant_stack_failure(p, depth, heads, needed) == pytest.approx(wanted, abs=1e-12)
        if needed == 1:
            assert theory.stack_failure(p, depth, heads) == pytest.approx(wanted, abs=1e-12)
            assert theory.stack_failure_linear(p, depth, heads) >= wanted - 1e-12  # Bernoulli's inequality


def test_redundancy_and_measured_rates():
    found = simulate_stack(0.2, 4, 6, needed=4, trials=20_000)
    assert found.exact == pytest.approx(theory.redundant_stack_failure(0.2, 4, 6, 4))
    assert found.simulated == pytest.approx(found.exact, abs=4 * found.error)
    rates = torch.tensor([[0.5, 0.9], [0.2, 0.4]])
    found = simulate_stack(rates, 2, 2, trials=20_000)
    assert found.exact == pytest.approx(1 - (1 - 0.45) * (1 - 0.08))
    assert found.simulated == pytest.approx(found.exact, abs=4 * found.error)
    with pytest.raises(WorkbenchError, match="outside"):
        simulate_stack(1.2, 2, 2)


def test_linear_range():
    n = theory.linear_range(64, 4, 2)
    assert theory.stack_failure_linear(n / 64, 4, 2) == pytest.approx(1.0)


def test_effective_dimension():
    random = sphere(2, 500, 24)
    sink = torch.zeros(500, dtype=torch.bool)
    found = geometry(random, sink)
    torch.testing.assert_close(found.dimension, torch.full((2, 4), 24.0, dtype=torch.float64), rtol=0.03, atol=0)
    torch.testing.assert_close(found.overlap * 24, torch.ones(2, dtype=torch.float64), rtol=0.03, atol=0)
    torch.testing.assert_close(found.spectrum.sum(-1), torch.ones(2, dtype=torch.float64))
    products = random[0] @ random[0].T
    wanted = (products**2).sum() - (products.diagonal() ** 2).sum()
    torch.testing.assert_close(mean_overlap(random)[0], wanted / (500 * 499))


def test_geometry_of_degenerate_keys():
    sink = torch.zeros(5, dtype=torch.bool)
    equal = geometry(sphere(1, 1, 6).expand(1, 5, 6), sink)
    assert equal.dimension.tolist() == [[pytest.approx(1.0), equal.dimension[0, 1], 0.0, pytest.approx(1.0)]]
    assert equal.overlap.item() == pytest.approx(1.0)
    nothing = geometry(torch.zeros(1, 5, 6), ~sink)
    assert nothing.dimension.tolist() == [[0.0, 0.0, 0.0, 0.0]]
    assert nothing.spectrum.isfinite().all()
    assert effective_dimension(torch.ones(1, 5, 1)).tolist() == [1.0]
