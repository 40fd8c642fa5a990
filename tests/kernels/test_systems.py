"""Layers as dynamical systems: recurrence, map and attention sum agree; DSF's equivalences; mixing operators."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.lightning import LightningPattern
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import DensePattern, Pattern
from workbench.kernels.recurrent import FilterPattern, RecurrentPattern, WKVPattern
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.state_space import DualPattern, SelectivePattern
from workbench.kernels.systems import (
    DynamicalSystem,
    aft,
    fnet,
    fnet_values,
    linear_attention,
    linformer,
    long_convolution,
    mlp_mixer,
    n_features,
    normalised_attention,
    nystrom,
    qlstm,
    reversed_sigmoid,
    rg_lru,
    s6,
    separable_attention,
    ssd,
    taylor_features,
    taylor_remainder,
    to_dsf,
)

TIGHT = {"atol": 1e-11, "rtol": 1e-10}
B, H, N, D = 2, 3, 17, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps(*shape: int) -> Tensor:
    return F.softplus(normal(*shape, seed=5))


V = normal(B, H, N, 5, seed=9)
MASK = Mask(N, N, causal=True)
Q, K = normal(B, H, N, D, seed=1), normal(B, H, N, D, seed=2)
GATES = [normal(B, H, N, seed=seed) for seed in (3, 4, 5)]

PATTERNS: dict[str, tuple[Callable[[], Pattern], str, int]] = {
    "linear": (lambda: RecurrentPattern(Q, K), "scalar", D),
    "decay": (lambda: RecurrentPattern(Q, K, -steps(B, H, N)), "scalar", D),
    "channels": (lambda: RecurrentPattern(Q, K, -steps(B, H, N, D)), "diagonal", D),
    "delta": (
        lambda: RecurrentPattern(Q, F.normalize(K, dim=-1), -steps(B, H, N), 2 * GATES[0].sigmoid()),
        "diagonal plus rank one", D),
    "kimi delta": (
        lambda: RecurrentPattern(Q, F.normalize(K, dim=-1), -steps(B, H, N, D), GATES[0].sigmoid()),
        "diagonal plus rank one", D),
    "groups": (lambda: RecurrentPattern(Q[:, :1], K[:, :1], -steps(B, H, N)), "scalar", D),
    "lightning": (lambda: LightningPattern(Q, K, torch.tensor([0.3, 0.9, 1.0])), "scalar", D),
    "mamba": (
        lambda: SelectivePattern(steps(B, H, N), -steps(H, D), Q[:, :1], K[:, :1]), "diagonal", D),
    "mamba-2": (lambda: DualPattern(steps(B, H, N), -steps(H), Q[:, :1], K[:, :1]), "scalar", D),
    "short convolution": (lambda: FilterPattern(normal(H, 4), B, N), "block", 4),
    "rwkv": (lambda: WKVPattern(3 * GATES[0], torch.tensor([0.0, 0.4, 3.0]).double(), GATES[1][0, :, 0]), "scalar", 1),
    "softmax": (lambda: SoftmaxPattern(Q, K, MASK), "scalar", N),
    "any causal map": (lambda: DensePattern(normal(B, H, N, N).tril(), MASK, normalised=False), "scalar", N),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_every_family_is_a_system_with_the_same_map(name: str):
    make, kind, n = PATTERNS[name]
    pattern = make()
    system = to_dsf(pattern)
    assert (system.kind, system.n) == (kind, n)
    phi = system.map()
    torch.testing.assert_close(phi, pattern.dense(), **TIGHT)
    assert bool((phi.triu(1) == 0).all())
    y, states = system.run(V)
    torch.testing.assert_close(y, pattern.apply(V), **TIGHT)
    assert states.shape == (B, H, N, n, 5)
    # the recurrence is y = C h + D v with Λ written out
    state = torch.zeros(B, H, n, 5, dtype=torch.float64)
    for i in range(N):
        state = system.transition(i) @ state + system.B[:, :, i, :, None] * V[:, :, i, None]
        torch.testing.assert_close(states[:, :, i], state, **TIGHT)
    if isinstance(pattern, RecurrentPattern):
        torch.testing.assert_close(pattern.state_at(-1, V), states[:, :, -1], **TIGHT)


def test_what_has_no_order_or_no_exponential_is_refused():
    with pytest.raises(CaptureError, match="later positions"):
        to_dsf(SoftmaxPattern(Q, K, Mask(N, N)))
    with pytest.raises(CaptureError, match="no exponential"):
        to_dsf(RecurrentPattern(Q, K), order=3)
    with pytest.raises(CaptureError, match="plain causal softmax"):
        to_dsf(SoftmaxPattern(Q, K, Mask(N, N, causal=True, window=3)), order=3)
    with pytest.raises(CaptureError, match="the limit is"):
        to_dsf(SoftmaxPattern(normal(1, 1, 8, 40), normal(1, 1, 8, 40), Mask(8, 8, causal=True)), order=6)
    with pytest.raises(CaptureError, match="needs both"):
        DynamicalSystem(Q, Q, Q, erased=Q)
    with pytest.raises(CaptureError, match="decay must be"):
        DynamicalSystem(Q[..., :2], Q, Q)
    with pytest.raises(CaptureError, match="values must be"):
        DynamicalSystem(Q, Q, Q).run(V[:, :1])


@pytest.mark.parametrize("order", [0, 1, 3, 6])
def test_a_truncated_softmax_is_off_by_no_more_than_its_bound(order: int):
    q, k = Q / 2, K / 2
    pattern = SoftmaxPattern(q, k, MASK)
    system = to_dsf(pattern, order)
    assert system.n == n_features(D, order) == taylor_features(q, order).shape[-1]
    off = (system.map() - pattern.dense()).abs().sum(-1)
    assert bool((off <= system.error + 1e-14).all())
    assert float(system.error.max()) < {0: 4.0, 1: 2.0, 3: 0.2, 6: 1e-3}[order]
    x = q @ k.mT
    powers = sum(x**p / math.factorial(p) for p in range(order + 1))
    torch.testing.assert_close(taylor_features(q, order) @ taylor_features(k, order).mT, powers, **TIGHT)
    assert bool(((x.exp() - powers).abs() <= taylor_remainder(x, order) + 1e-14).all())


@pytest.mark.parametrize("which", ["separable", "linear", "normalised"])
def test_attention_sums_are_recurrences_are_maps(which: str):
    log_eta = GATES[0]
    phi, psi = (F.elu(t) + 1 for t in (Q, K))
    scores, eta, system = {
        "separable": (phi @ psi.mT, log_eta.exp(), separable_attention(phi, psi, log_eta.exp())),
        "linear": (phi @ psi.mT, (phi @ psi.mT).tril().sum(-1), linear_attention(Q, K)),
        "normalised": (Q @ K.mT, log_eta.exp(), normalised_attention(Q, K, log_eta)),
    }[which]
    attention = scores.tril() / eta[..., None]
    torch.testing.assert_close(system.map(), attention, **TIGHT)
    torch.testing.assert_close(system.run(V)[0], attention @ V, **TIGHT)
    products = system.decay[..., 0].cumprod(-1)  # they telescope
    for i, j in ((N - 1, 0), (9, 4)):
        torch.testing.assert_close(products[..., i] / products[..., j], eta[..., j] / eta[..., i], **TIGHT)
    if which == "linear":
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(eta), **TIGHT)
    constant = separable_attention(phi, psi, torch.full_like(eta, 2.0))
    assert bool((constant.decay == 1).all())


def test_normalised_attention_without_weights_is_plain_and_scales_with_its_queries():
    plain = normalised_attention(Q, K, torch.zeros(B, H, N, dtype=torch.float64))
    torch.testing.assert_close(plain.map(), (Q @ K.mT).tril(), **TIGHT)
    one, three = (normalised_attention(c * Q, K, GATES[0]).map() for c in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one, **TIGHT)
    q, k = Q.abs(), K.abs()
    one, three = (linear_attention(c * q, k, lambda t: t).map() for c in (1.0, 3.0))  # a homogeneous feature map
    torch.testing.assert_close(one, three, **TIGHT)


def test_linear_attention_is_s6_where_their_couplings_agree():
    """Λ = η_{i−1}/η_i as exp(−Δ), its keys as Δ b: conditions under which DSF's two ways to couple Λ and B meet."""
    eta = steps(B, H, N).cumsum(-1) + 1  # it grows, so that Λ ≤ 1 as S6's is
    attention = separable_attention(Q, K, eta)
    delta = torch.diff(eta.log(), prepend=eta[..., :1].log(), dim=-1)
    delta[..., 0] = 1.0  # nothing was before: any step will do
    b = K / (eta * delta)[..., None]
    for head in range(H):
        scalar = ssd(delta[:, [head]], -torch.ones(1).double(), b[:, [head]], Q[:, [head]])
        torch.testing.assert_close(scalar.map()[:, 0], attention.map()[:, head], **TIGHT)
        shared = s6(delta[:, [head]], -torch.ones(1, D).double(), b[:, head], Q[:, head])
        torch.testing.assert_close(shared.map()[:, 0], attention.map()[:, head], **TIGHT)


def test_s6_whose_rates_are_equal_is_ssd_and_its_limits():
    delta, a = steps(B, H, N), -steps(H)
    whole = ssd(delta, a, K[:, :1].expand_as(K), Q[:, :1].expand_as(Q))
    torch.testing.assert_close(s6(delta, a[:, None].expand(H, D), K[:, 0], Q[:, 0]).map(), whole.map(), **TIGHT)
    ones = torch.ones(B, H, N, dtype=torch.float64)
    never = ssd(ones, torch.zeros(H).double(), K, Q)  # nothing fades: causal linear attention without a norm
    torch.testing.assert_close(never.map(), (Q @ K.mT).tril(), **TIGHT)
    at_once = ssd(delta + 0.1, torch.full((H,), -1e6).double(), K, Q)  # all fades: the diagonal alone
    torch.testing.assert_close(at_once.map(), torch.diag_embed((delta + 0.1) * (Q * K).sum(-1)), **TIGHT)
    sums = ssd(ones, torch.full((H,), 0.5).double().log(), *[torch.ones(B, H, N, 1).double()] * 2).map().sum(-1)
    i = torch.arange(1, N + 1).double()
    torch.testing.assert_close(sums[0, 0], (1 - 0.5**i) / 0.5, **TIGHT)
    for rows, columns in ((slice(5, N), slice(0, 6)), (slice(10, N), slice(2, 11))):  # semiseparable
        assert int(torch.linalg.matrix_rank(whole.map()[0, 0, rows, columns], rtol=1e-9)) <= D


def test_gated_units():
    f, g, o = GATES
    x = V[..., 0]
    for alpha in (None, 1.0, 2.5, -3.0):
        state, wanted = torch.zeros(B, H, dtype=torch.float64), []
        for i in range(N):
            keep = torch.sigmoid(f[..., i]) if alpha is None else torch.sigmoid(-f[..., i]) ** max(alpha, 0.0)
            state = keep * state + torch.sigmoid(g[..., i]) * x[..., i]
            wanted.append(torch.sigmoid(o[..., i]) * state)
        found, _ = qlstm(f, g, o, alpha).run(x[..., None])
        torch.testing.assert_close(found.squeeze(-1), torch.stack(wanted, dim=-1), **TIGHT)
    a = steps(H)[:, None]
    torch.testing.assert_close(reversed_sigmoid(f, a), (-a * F.softplus(f)).exp(), atol=1e-16, rtol=1e-14)
    # S6's decay with A = −a and Δ = softplus is the reversed sigmoid
    as_s6 = s6(F.softplus(f), -a.expand(H, 1), torch.ones(B, N, 1).double(), torch.ones(B, N, 1).double())
    torch.testing.assert_close(as_s6.decay.squeeze(-1), reversed_sigmoid(f, a), atol=1e-15, rtol=1e-13)

    unit = rg_lru(f, g, GATES[2][0, :, 0])
    state, rate = torch.zeros(B, H, dtype=torch.float64), F.softplus(GATES[2][0, :, 0])
    for i in range(N):
        keep = (-8 * rate * torch.sigmoid(f[..., i])).exp()
        state = keep * state + (1 - keep**2).sqrt() * torch.sigmoid(g[..., i]) * x[..., i]
        torch.testing.assert_close(unit.run(x[..., None])[1][:, :, i, 0, 0], state, **TIGHT)
    assert bool((unit.C == 1).all())


def by_units(layer: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """The operator of a layer that is linear in its values: what it makes of each unit vector."""
    return layer(torch.eye(n, dtype=torch.float64))


def test_mixing_operators_are_what_the_layers_do_to_unit_vectors():
    n = 12
    q, k = normal(1, 1, n, D, seed=1), normal(1, 1, n, D, seed=2)
    E, G = normal(5, n, seed=3), normal(5, n, seed=4)
    found = linformer(q, k, E, G)
    want = by_units(lambda v: (q[0, 0] @ (E @ k[0, 0]).T / math.sqrt(D)).softmax(-1) @ (G @ v), n)
    torch.testing.assert_close(found.dense()[0, 0], want, **TIGHT)
    assert (found.signed, found.normalised, found.by_magnitude) == (True, False, True)

    every = nystrom(q, k, n)  # as many landmarks as positions: the softmax itself
    torch.testing.assert_close(every.dense(), (q @ k.mT / math.sqrt(D)).softmax(-1), atol=1e-7, rtol=1e-6)
    few = nystrom(q, k, 3).dense()
    assert int(torch.linalg.matrix_rank(few[0, 0], rtol=1e-9)) == 3
    with pytest.raises(CaptureError, match="do not divide"):
        nystrom(q, k, 5)

    x = normal(2, n, 6)
    both = fnet(n).dense() @ fnet_values(x)
    torch.testing.assert_close(both.sum(1), torch.fft.fft2(x).real, atol=1e-10, rtol=1e-10)
    i = torch.arange(n).double()
    torch.testing.assert_close(fnet(n).dense()[0, 0], torch.cos(2 * math.pi * i[:, None] * i / n), atol=1e-12, rtol=0)

    first, second = normal(7, n, seed=5), normal(n, 7, seed=6)
    hidden = first @ x[0]  # [hidden, channel]
    gates = torch.special.ndtr(hidden).T[None]  # GELU(x) / x
    out = (mlp_mixer(first, second, gates).dense()[0] @ x[0].T[..., None]).squeeze(-1).T
    torch.testing.assert_close(out, second @ F.gelu(hidden), **TIGHT)

    kernel = normal(6, n, seed=7)
    toeplitz = long_convolution(kernel).dense()[0]
    for c in range(6):
        want = torch.stack([torch.nn.functional.pad(kernel[c], (j, 0))[:n] for j in range(n)], dim=1)
        torch.testing.assert_close(toeplitz[c], want, **TIGHT)
    decay = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s4 = long_convolution(decay[:, None] ** torch.arange(n))  # K = C A^i B of a state of one number
    one = torch.ones(1, 6, n, 1, dtype=torch.float64)
    scan = RecurrentPattern(one, one, decay.log()[None, :, None].expand(1, 6, n))
    torch.testing.assert_close(s4.dense(), scan.dense(), **TIGHT)

    bias, keys = normal(n, n, seed=8), normal(2, 6, n, seed=9)
    for causal in (True, False):
        attention_free = aft(keys, bias, causal=causal).dense()
        weights = (keys[:, :, None] + bias).exp()
        weights = weights.tril() if causal else weights
        torch.testing.assert_close(attention_free, weights / weights.sum(-1, keepdim=True), **TIGHT)
        torch.testing.assert_close(attention_free.sum(-1), torch.ones(2, 6, n).double(), **TIGHT)
    # RWKV-4 is AFT with a bias that falls with the distance, but for the position itself
    rate, bonus = (torch.full((6,), number, dtype=torch.float64) for number in (0.3, 0.7))
    far = (torch.arange(n)[:, None] - torch.arange(n)).double()
    falling = torch.where(far == 0, 0.7, -0.3 * (far - 1))
    torch.testing.assert_close(WKVPattern(keys, rate, bonus).dense(), aft(keys, falling).dense(), **TIGHT)
