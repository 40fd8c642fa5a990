"""Maps of recurrences: tiles against the definition, and that against judges; limits, states, files, bad input."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.judges import naive_of_fla
from support.recurrences import KINDS, inputs
from workbench.errors import CaptureError
from workbench.kernels import families
from workbench.kernels.lightning import LightningPattern
from workbench.kernels.patterns import Pattern
from workbench.kernels.recurrent import (
    FilterPattern,
    RecurrentPattern,
    WKVPattern,
    naive_recurrence,
    naive_recurrent_pattern,
)
from workbench.kernels.state_space import naive_dual, naive_selective
from workbench.kernels.statistics import dense

SIZES = [1, 17, 63, 64, 65, 100, 200]
TIGHT = {"atol": 1e-11, "rtol": 1e-10}
STATISTICS = [
    "entropy", "peak", "peak_key", "effective_keys", "distance", "distance_var", "sink", "current", "previous",
    "signed_mass", "received", "received_mean", "top_keys", "pooled_mean", "pooled_max",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), [*((n, 3) for n in SIZES), (1, 33), (65, 33), (200, 33)])
def test_tiles_chunks_and_recurrence_agree(kind: str, n: int, d: int):
    made = inputs(kind, n, d=d)
    v = torch.randn(2, 4, n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want, last = naive_recurrence(made["q"], made["k"], v, made.get("log_decay"), made.get("beta"))
    whole, pattern = naive_recurrent_pattern(**made), RecurrentPattern(**made)
    torch.testing.assert_close(whole @ v, want, **TIGHT)
    torch.testing.assert_close(pattern.dense(), whole, **TIGHT)
    torch.testing.assert_close(pattern.apply(v), want, **TIGHT)
    torch.testing.assert_close(Pattern.apply(pattern, v), want, **TIGHT)  # tile by tile
    torch.testing.assert_close(pattern.state_at(-1, v), last, **TIGHT)
    for at in {0, n // 2, n - 1}:
        part = {name: t[:, :, : at + 1] for name, t in made.items() if name not in ("q", "k")}
        _, state = naive_recurrence(*(t[:, :, : at + 1] for t in (made["q"], made["k"], v)), **part)
        torch.testing.assert_close(pattern.state_at(at, v), state, **TIGHT)
    for every in {1, 7, 16, 64}:
        states = pattern.states(v, every=every)
        assert states.shape[2] == n // every
        for at in {0, n // every - 1} if n >= every else ():
            torch.testing.assert_close(states[:, :, at], pattern.state_at((at + 1) * every - 1, v), **TIGHT)
    assert bool((pattern.dense().triu(1) == 0).all())
    assert (pattern.grade, pattern.signed, pattern.normalised, pattern.by_magnitude) == ("frozen", True, False, True)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 150), st.data())
def test_any_tile(kind: str, n: int, data: st.DataObject):
    made = inputs(kind, n, b=1, h=2)
    pattern, whole = RecurrentPattern(**made), naive_recurrent_pattern(**made)
    for _ in range(3):  # in any order: what is kept of one tile must not show in the next
        edges = st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted)
        rows, columns = (slice(*data.draw(edges)) for _ in range(2))
        heads = data.draw(st.lists(st.integers(0, 1), max_size=3))
        want = whole[:, heads][:, :, rows, columns]
        torch.testing.assert_close(pattern.tile(rows, columns, heads), want, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close_where_decays_are_strong(kind: str):
    made = inputs(kind, 200)
    if "log_decay" in made:
        made["log_decay"] = 30 * made["log_decay"]  # a product of their inverses would overflow
    pattern = RecurrentPattern(**{name: t.float() for name, t in made.items()})
    assert pattern.dtype == torch.float32
    torch.testing.assert_close(pattern.dense().double(), naive_recurrent_pattern(**made), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_dense_map(kind: str):
    n = 300  # several strips of tiles
    made = inputs(kind, n, b=1, h=2)
    v = torch.randn(1, 2, n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    pattern = RecurrentPattern(**made, values=v)
    want = dense(naive_recurrent_pattern(**made), STATISTICS, pattern.mask, by_magnitude=True)
    for name, value in pattern.statistics(STATISTICS).items():
        torch.testing.assert_close(value, want[name], atol=1e-9, rtol=1e-8, equal_nan=True)
    assert bool(pattern.statistics(["value_weighted_entropy"])["value_weighted_entropy"].isfinite().all())


def test_what_a_decay_of_minus_infinity_and_a_full_step_forget():
    made = inputs("gated delta", 40)
    made["log_decay"][:, :, [7, 20]] = -torch.inf
    whole = RecurrentPattern(**made).dense()
    torch.testing.assert_close(whole, naive_recurrent_pattern(**made), **TIGHT)
    assert bool((whole[:, :, 7:, :7] == 0).all())
    assert bool((whole[:, :, 20:, 7:20] == 0).all())
    key = torch.nn.functional.normalize(torch.ones(1, 1, 9, 3, dtype=torch.float64), dim=-1)
    erased = RecurrentPattern(key, key, beta=torch.ones(1, 1, 9, dtype=torch.float64)).dense()
    torch.testing.assert_close(erased[0, 0], torch.eye(9, dtype=torch.float64), **TIGHT)  # one key: the last value


def test_state_spaces_lightning_and_linear_attention_are_recurrences():
    """One representation, Λ, B and C, of what the other patterns define (arXiv 2405.15731)."""
    gen = torch.Generator().manual_seed(0)
    n, d = 70, 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    q, k, delta, A = normal(n, d), normal(n, d), normal(n).exp(), -normal(d).exp()
    write = (delta[:, None] * k)[None, None]
    dual = RecurrentPattern(q[None, None], write, (delta * A[0])[None, None])
    torch.testing.assert_close(dual.dense()[0, 0], naive_dual(delta, A[0], k, q), **TIGHT)
    selective = RecurrentPattern(q[None, None], write, (delta[:, None] * A)[None, None])
    torch.testing.assert_close(selective.dense()[0, 0], naive_selective(delta, A, k, q), **TIGHT)
    rates = torch.tensor([0.7, 0.99], dtype=torch.float64)
    q, k = normal(1, 2, n, d), normal(1, 2, n, d)
    constant = RecurrentPattern(q, k, rates.log()[None, :, None].expand(1, 2, n))
    torch.testing.assert_close(constant.dense(), LightningPattern(q, k, rates).dense(), **TIGHT)
    torch.testing.assert_close(RecurrentPattern(q, k).dense(), (q @ k.mT).tril(), **TIGHT)


def test_content_times_decay_is_the_map_where_a_head_has_one_decay():
    made = inputs("decay", 90)
    pattern = RecurrentPattern(**made)
    torch.testing.assert_close(pattern.content().dense() * pattern.decay().dense(), pattern.dense(), **TIGHT)
    half = RecurrentPattern(made["q"], made["k"], torch.full((2, 4, 90), 0.5, dtype=torch.float64).log() / 6)
    torch.testing.assert_close(half.half_life, torch.full((2, 4, 1), 6.0, dtype=torch.float64))
    assert bool(half.content().half_life.isposinf().all())
    channels = RecurrentPattern(**inputs("channels", 90))
    assert channels.half_life.shape == (2, 4, 3)
    own = channels.decay().dense().diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(own, torch.ones_like(own))


def test_grouped_queries_and_keys():
    made = inputs("gated delta", 33, h=4)
    grouped = {name: t[:, :2] if name in ("q", "k") else t for name, t in made.items()}
    wide = {name: t.repeat_interleave(2, dim=1) if name in ("q", "k") else t for name, t in grouped.items()}
    torch.testing.assert_close(RecurrentPattern(**grouped).dense(), naive_recurrent_pattern(**wide), **TIGHT)
    plain = RecurrentPattern(grouped["q"], grouped["k"], n_heads=6)
    assert plain.shape == (2, 6, 33, 33)


@pytest.mark.parametrize(
    ("kind", "kernel", "name"),
    [
        ("gated delta", "gated_delta_rule", "naive_recurrent_gated_delta_rule"),
        ("kimi delta", "kda", "naive_recurrent_kda"),
        ("channels", "gla", "naive_recurrent_gla"),
    ],
)
def test_against_the_naive_code_of_flash_linear_attention(kind: str, kernel: str, name: str):
    made = {name: t.float() for name, t in inputs(kind, 45).items()}
    v = torch.randn(2, 4, 45, 5, generator=torch.Generator().manual_seed(1))
    given = {"q": made["q"], "k": made["k"], "v": v, "gk" if kind == "channels" else "g": made["log_decay"]}
    given |= {"beta": made["beta"]} if "beta" in made else {}
    out = naive_of_fla(kernel, name)(**{name: t.transpose(1, 2) for name, t in given.items()})[0].transpose(1, 2)
    scaled = made | {"q": made["q"] * made["q"].shape[-1] ** -0.5}
    torch.testing.assert_close(RecurrentPattern(**scaled).apply(v), out.float(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("n", [1, 3, 17, 100])
def test_filters_are_convolutions(n: int):
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=gen)
    v = torch.randn(2, 5, n, dtype=torch.float64, generator=gen)
    pattern = FilterPattern(weight, 2, n)
    want = torch.nn.functional.conv1d(v, weight[:, None], padding=3, groups=5)[..., :n]
    torch.testing.assert_close(pattern.apply(v[..., None]).squeeze(-1), want, **TIGHT)
    assert pattern.grade == "exact"
    names = ["entropy", "distance", "received", "signed_mass"]
    truth = dense(pattern.dense(), names, pattern.mask, by_magnitude=True)
    for name, value in pattern.statistics(names).items():
        torch.testing.assert_close(value, truth[name], atol=1e-10, rtol=1e-10)
    padding = torch.zeros(2, n, dtype=torch.bool)
    padding[0, : n // 2] = True
    hidden = FilterPattern(weight, 2, n, padding=padding)
    assert bool((hidden.dense()[0, ..., : n // 2] == 0).all())
    torch.testing.assert_close(hidden.dense()[1], pattern.dense()[1])


@pytest.mark.parametrize("n", [1, 17, 100])
def test_wkv_is_the_softmax_of_its_definition(n: int):
    gen = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 3, n, dtype=torch.float64, generator=gen) * 3 for _ in range(2))
    rate, bonus = torch.tensor([0.0, 0.4, 30.0]).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    out = torch.empty_like(v)
    for i in range(n):
        scores = k[..., :i] - rate[:, None] * (i - 1 - torch.arange(i))
        weights = torch.cat((scores, (k[..., i] + bonus)[..., None]), dim=-1).softmax(-1)
        out[..., i] = (weights * v[..., : i + 1]).sum(-1)
    pattern = WKVPattern(k, rate, bonus)
    torch.testing.assert_close(pattern.apply(v[..., None]).squeeze(-1), out, **TIGHT)
    torch.testing.assert_close(pattern.dense().sum(-1), torch.ones(2, 3, n, dtype=torch.float64))
    scores = pattern.dense()[:, :, n - 1, n - 1].log() + pattern.lse[:, :, -1]
    torch.testing.assert_close(scores, k[..., -1] + bonus)
    names = ["entropy", "received", "distance", "peak"]
    truth = dense(pattern.dense(), names, pattern.mask)
    for name, value in pattern.statistics(names).items():
        torch.testing.assert_close(value, truth[name], atol=1e-9, rtol=1e-9)


def test_files_bring_them_back():
    gen = torch.Generator().manual_seed(0)
    padding = torch.tensor([[True, False, False], [False, False, False]])
    values = torch.randn(2, 4, 20, 3, generator=gen)
    made: list[Pattern] = [
        *(RecurrentPattern(**inputs(kind, 20), values=values) for kind in KINDS),
        FilterPattern(torch.randn(4, 3, generator=gen), 2, 3, padding=padding),
        WKVPattern(torch.randn(2, 4, 9, generator=gen), torch.rand(4, generator=gen), torch.rand(4, generator=gen)),
    ]
    for pattern in made:
        whole = pattern.dense()
        again = families.rebuild(type(pattern).__name__, *pattern.state())
        assert torch.equal(again.dense(), whole)
        assert again.state()[1].keys() == pattern.state()[1].keys()
        assert not {"_chunks", "_strip"} & pattern.kept(lambda name, t: t.clone()).__dict__.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_from_before_is_gone_on_from_or_asked_for(kind: str):
    """Half of a sequence knows what its rows read of the other half, and not what that has left."""
    made, v = inputs(kind, 20), torch.randn(2, 4, 20, 5, dtype=torch.float64)
    whole = RecurrentPattern(**made)
    early, late = (
        RecurrentPattern(**{name: t[:, :, at] for name, t in made.items()}) for at in (slice(9), slice(9, 20))
    )
    left = early.state_at(-1, v[:, :, :9])
    late.before, late.values = late.from_state(left), v[:, :, 9:]
    for ask in (lambda: late.state_at(3), lambda: late.state_at(3, v[:, :, 9:]), lambda: late.states(every=2)):
        with pytest.raises(CaptureError, match="goes on from an earlier state"):
            ask()
    torch.testing.assert_close(late.state_at(3, initial_state=left), whole.state_at(12, v), **TIGHT)
    torch.testing.assert_close(late.states(initial_state=left)[:, :, -1], whole.state_at(-1, v), **TIGHT)
    alone = torch.zeros_like(left)
    late.before = None
    torch.testing.assert_close(late.state_at(3), late.state_at(3, initial_state=alone), **TIGHT)
    with pytest.raises(CaptureError, match=r"initial state must be \[2, 4, 3, 5\]"):
        late.state_at(3, initial_state=left[..., :2])


def test_what_cannot_be_is_refused():
    made = inputs("gated delta", 5)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("at most zero", {"log_decay": -made["log_decay"]}),
        ("at most zero", {"log_decay": made["log_decay"] * torch.nan}),
        ("log_decay must be", {"log_decay": made["log_decay"][..., :3]}),
        ("beta must be", {"beta": made["beta"][:, :2]}),
        ("beta holds nan", {"beta": made["beta"] * torch.nan}),
        ("split evenly|must both be", {"k": made["k"][:, :2]}),
        ("floating point", {"beta": made["beta"].long()}),
    ]
    for message, changed in cases:
        with pytest.raises(CaptureError, match=message):
            RecurrentPattern(**made | changed)
    with pytest.raises(CaptureError, match="no position 5"):
        RecurrentPattern(**made).state_at(5, torch.zeros(2, 4, 5, 1))
    with pytest.raises(CaptureError, match="a state is made of values"):
        RecurrentPattern(**made).state_at(0)
    with pytest.raises(CaptureError, match="values must be"):
        RecurrentPattern(**made).apply(torch.zeros(2, 4, 3, 1))
    with pytest.raises(CaptureError, match="below zero"):
        WKVPattern(torch.zeros(1, 1, 2), -torch.ones(1), torch.zeros(1))
    with pytest.raises(CaptureError, match="padding must be"):
        FilterPattern(torch.zeros(1, 2), 1, 3, padding=torch.zeros(1, 2, dtype=torch.bool))
