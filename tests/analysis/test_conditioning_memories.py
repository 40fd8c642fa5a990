"""Memories against their definitions: the recurrent form, exact recall, fixed points, stable ranges."""

from __future__ import annotations

import pytest
import torch

from workbench.analysis.conditioning import FEATURES, RULES, feature_map, memory
from workbench.errors import WorkbenchError
from workbench.kernels.lightning import lightning_attention

OPTIONS = {"decay": {"decay": 0.9}, "delta": {"rate": 0.7}, "gated_delta": {"decay": 0.9, "rate": 0.7}}


def pairs(*shape: int, d_k: int, d_v: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(*shape, d, generator=generator, dtype=torch.float64) for d in (d_k, d_v))
    return k / k.norm(dim=-1, keepdim=True), v / v.norm(dim=-1, keepdim=True)


def make(rule: str, *args, **options):
    return memory(rule, *args, dtype=torch.float64, **OPTIONS.get(rule, {}) | options)


def naive(rule: str, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """S of one head after one write at a time, as the rules are printed."""
    s, theta = torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype), torch.zeros(v.shape[1], dtype=k.dtype)
    for x, y in zip(k, v, strict=True):
        if rule == "hebb":
            s = s + torch.outer(x, y)
        elif rule == "decay":
            s = 0.9 * s + torch.outer(x, y)
        elif rule == "delta":
            s = s + 0.7 * torch.outer(x, y - x @ s)
        elif rule == "gated_delta":
            s = 0.9 * (s - 0.7 * torch.outer(x, x @ s)) + 0.7 * torch.outer(x, y)
        elif rule == "oja":
            s = s @ (torch.eye(len(y), dtype=k.dtype) - 0.1 * torch.diag(y * y)) + 0.1 * torch.outer(x, y)
        else:
            s, theta = s + torch.outer(x, y * (y - theta)), 0.9 * theta + 0.1 * y * y
    return s


@pytest.mark.parametrize("n", [1, 17, 63, 100])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "softmax"])
def test_block_form_is_the_recurrence(rule, n):
    k, v = pairs(2, 3, n, d_k=7, d_v=5)
    held = make(rule, 7, 5, (2, 3))
    held.write(k[..., : n // 3, :], v[..., : n // 3, :])
    held.write(k[..., n // 3 :, :], v[..., n // 3 :, :])
    torch.testing.assert_close(held.state[1, 2], naive(rule, k[1, 2], v[1, 2]), rtol=1e-10, atol=1e-10)
    one = make(rule, 7, 5)
    for i in range(n):
        one.write(k[1, 2, i], v[1, 2, i])
    torch.testing.assert_close(one.state, held.state[1, 2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("rule", "decay"), [("hebb", 1.0), ("decay", 0.9)])
def test_reading_after_each_write_is_linear_attention(rule, decay):
    """Theorem 5: the parallel form, with weights γ^(i−j) below the diagonal, is the recurrent one."""
    k, v = pairs(1, 1, 33, d_k=6, d_v=4)
    q, _ = pairs(1, 1, 33, d_k=6, d_v=4, seed=1)
    held, out = make(rule, 6, 4), []
    for i in range(33):
        held.write(k[0, 0, i], v[0, 0, i])
        out.append(held.read(q[0, 0, i]))
    wanted = lightning_attention(q, k, v, torch.tensor([decay], dtype=torch.float64))
    torch.testing.assert_close(torch.stack(out), wanted[0, 0], rtol=1e-12, atol=1e-12)
    away = torch.arange(33)[:, None] - torch.arange(33)
    weights = (q[0, 0] @ k[0, 0].T * torch.tensor(decay, dtype=torch.float64) ** away.clamp(min=0)).tril()
    torch.testing.assert_close(torch.stack(out), weights @ v[0, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["identity", "elu+1", "softmax"])
@pytest.mark.parametrize("norm", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_a_hebbian_memory_with_a_norm_is_norm_attention(norm, name):
    """Theorem 5: S_i = S_{i−1} + φ(k_i)ᵀ v_i and o_i = Norm(φ(q_i) S_i), to machine precision."""
    k, v = pairs(21, d_k=6, d_v=5)
    q, _ = pairs(21, d_k=6, d_v=5, seed=1)
    phi, _ = feature_map(name, 6)
    norm = norm(5, dtype=torch.float64)
    held, out = make("hebb", 6, 5, features=name), []
    for i in range(21):
        held.write(k[i], v[i])
        out.append(norm(held.read(q[i])))
    torch.testing.assert_close(torch.stack(out), norm((phi(q) @ phi(k).T).tril() @ v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [9, 16])
@pytest.mark.parametrize("rule", ["hebb", "delta"])
def test_orthonormal_keys_are_recalled_exactly(rule, n):
    k = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0][:n]
    v = torch.randn(n, 5, dtype=torch.float64)
    held = make(rule, 16, 5, rate=1.0)
    held.write(k, v)
    torch.testing.assert_close(held.read(k), v, rtol=1e-12, atol=1e-12)


def test_delta_with_rate_one_recalls_the_last_pair_exactly():
    k, v = pairs(20, d_k=8, d_v=3)
    held = make("delta", 8, 3, rate=1.0)
    for i in range(20):
        before = held.read(k[: i + 1])
        held.write(k[i], v[i])
        assert (held.read(k[i]) - v[i]).abs().max() < 1e-15 * 8
        moved = held.read(k[:i]) - before[:i]  # earlier items move along k_j·k_i only
        wanted = (k[:i] @ k[i])[:, None] * (v[i] - before[i])
        torch.testing.assert_close(moved, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rate", [0.5, 1.0, 1.7])
def test_delta_converges_to_exact_recall(rate):
    k, v = pairs(8, d_k=16, d_v=3)
    held = make("delta", 16, 3, rate=rate)
    for _ in range(400):
        held.write(k, v)
    assert (held.read(k) - v).abs().max() < 20 * 8.9e-16


def test_delta_converges_to_least_squares_where_keys_are_too_many():
    k, v = pairs(40, d_k=4, d_v=3)
    held = make("delta", 4, 3, rate=1e-3)
    for _ in range(3000):
        held.write(k, v)
    torch.testing.assert_close(held.state, torch.linalg.lstsq(k, v).solution, rtol=0, atol=2e-3)


def test_oja_settles_at_the_key_over_the_value():
    k, v = torch.tensor([0.6, 0.8], dtype=torch.float64), torch.tensor([0.5, -2.0], dtype=torch.float64)
    held = make("oja", 2, 2, rate=0.3)
    held.write(k, v)
    first = held.state - torch.outer(k, 1 / v)
    held.write(k, v)
    torch.testing.assert_close(held.state - torch.outer(k, 1 / v), first * (1 - 0.3 * v * v))
    held.write(k.expand(400, 2), v.expand(400, 2))
    torch.testing.assert_close(held.state, torch.outer(k, 1 / v))


@pytest.mark.parametrize("drive", [0.5, 1.9])
def test_oja_is_stable_up_to_its_bound(drive):
    """The distance to the fixed point shrinks by 1 − αv² at each write: up to αv² = 2, where the rule is refused."""
    k, v = torch.ones(1, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    held, away = make("oja", 1, 1, rate=drive / 4), [-0.5]
    for _ in range(5):
        held.write(k, v)
        away.append(held.state.item() - 0.5)
    assert away == pytest.approx([-0.5 * (1 - drive) ** i for i in range(6)])
    with pytest.raises(WorkbenchError, match=r"reaches 2 and must stay below 2[^.]*\n.*below 0\.5"):
        make("oja", 1, 1, rate=0.5).write(k, v)


def test_bcm_changes_sign_at_its_threshold():
    k = torch.ones(1, dtype=torch.float64)
    for value, sign in [(0.0, 0), (0.3, -1), (0.5, 0), (0.7, 1), (-0.2, 1)]:
        held = make("bcm", 1, 1, threshold=0.5)
        held.write(k, torch.tensor([value], dtype=torch.float64))
        assert torch.sign(held.state).item() == sign


def test_softmax_reads_as_attention_does():
    k, v = pairs(2, 9, d_k=4, d_v=3)
    held = make("softmax", 4, 3, (2,), scale=2.0)
    held.write(k[:, :4], v[:, :4])
    held.write(k[:, 4:], v[:, 4:])
    wanted = torch.nn.functional.scaled_dot_product_attention(k[None], k[None], v[None], scale=2.0)[0]
    torch.testing.assert_close(held.read(k), wanted)
    torch.testing.assert_close(held.state, torch.cat([k, v], -1))


@pytest.mark.parametrize("name", FEATURES)
def test_linear_memories_compare_features(name):
    k, v = pairs(9, d_k=4, d_v=3)
    phi, width = feature_map(name, 4)
    held = make("hebb", 4, 3, features=name)
    held.write(k, v)
    assert held.state.shape == (width, 3)
    torch.testing.assert_close(held.read(k), phi(k) @ phi(k).T @ v)


def test_random_features_approach_the_exponential_kernel():
    x, _ = pairs(5, d_k=3, d_v=1)
    phi, _ = feature_map("exp", 3, n_random=200_000)
    torch.testing.assert_close(phi(x) @ phi(x).T, (x @ x.T).exp(), rtol=0.05, atol=0.0)


@pytest.mark.parametrize(
    ("rule", "options", "says"),
    [
        ("decay", {"decay": 1.01}, r"outside its stable range \(0, 1\]"),
        ("gated_delta", {"decay": 0.0}, r"outside its stable range \(0, 1\]"),
        ("bcm", {"average": 1.0}, r"outside its range \[0, 1\)"),
        ("hebb", {"rate": -1.0}, "above 0"),
        ("softmax", {"scale": float("nan")}, "above 0"),
        ("hebb", {"decay": 0.5}, "does not take"),
        ("hebbian", {}, 'did you mean "hebb"'),
    ],
)
def test_bad_options_are_named(rule, options, says):
    with pytest.raises(WorkbenchError, match=says):
        memory(rule, 4, 4, **options)


def test_unstable_rates_name_the_bound():
    k, v = torch.full((3, 4), 1.0), torch.full((3, 2), 3.0)
    with pytest.raises(WorkbenchError, match=r"reaches 4 and must stay below 2[^.]*\n.*below 0\.5"):
        memory("delta", 4, 2, rate=1.0).write(k, v)
    with pytest.raises(WorkbenchError, match=r"reaches 4 and must stay below 3"):
        memory("gated_delta", 4, 2, rate=1.0, decay=0.5).write(k, v)
    with pytest.raises(WorkbenchError, match=r"reaches 4.5 and must stay below 2"):
        memory("oja", 4, 2, rate=0.5).write(k, v)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(WorkbenchError, match="do not fit"):
        memory("hebb", 4, 4, (2,)).write(torch.zeros(3, 4), torch.zeros(3, 4))
