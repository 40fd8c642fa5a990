"""Gated linear attention and the gated delta rule: forward and gradients against the recurrence, and bad input."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from support.recurrences import KINDS, inputs
from workbench.errors import CaptureError
from workbench.kernels.recurrent import (
    RecurrentPattern,
    gated_delta_rule,
    gated_linear_attention,
    naive_recurrence,
    naive_recurrent_pattern,
)

TIGHT = {"atol": 1e-11, "rtol": 1e-10}
SIZES = [(1, 1), (17, 16), (63, 64), (65, 7), (200, 64)]  # positions, and those of a chunk


def tensors(kind: str, n: int, *, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    """With values and an initial state, float64, each wanting its gradient."""
    made = inputs(kind, n, seed=seed, **sizes)
    b, h, _, d = made["q"].shape
    gen = torch.Generator().manual_seed(seed + 1)
    made["v"] = torch.randn(b, h, n, 5, generator=gen, dtype=torch.float64)
    made["state"] = torch.randn(b, h, d, 5, generator=gen, dtype=torch.float64)
    return {name: t.requires_grad_() for name, t in made.items()}


def call(made: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The function for these inputs, from their state: what is read, and the last state."""
    given = {name: t for name, t in made.items() if name != "state"}
    function = gated_delta_rule if "beta" in made else gated_linear_attention
    out, state = function(**given, initial_state=made.get("state"), return_state=True, **options)
    return out, state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "chunk"), SIZES)
def test_forward_and_gradients_are_those_of_the_recurrence(kind: str, n: int, chunk: int):
    made = tensors(kind, n, b=1, h=3)
    out, state = call(made, chunk=chunk)
    want, last = naive_recurrence(**made)
    torch.testing.assert_close(out, want, **TIGHT)
    torch.testing.assert_close(state, last, **TIGHT)
    gen = torch.Generator().manual_seed(5)
    weights = [torch.randn(t.shape, generator=gen, dtype=t.dtype) for t in (out, state)]
    wanted = torch.autograd.grad((want, last), list(made.values()), weights)
    for name, g, w in zip(made, torch.autograd.grad((out, state), list(made.values()), weights), wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-9, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_the_gradient_of_either_result_alone():
    made = tensors("gated delta", 20)
    for which in (0, 1):
        got = torch.autograd.grad(call(made, chunk=8)[which].square().sum(), list(made.values()), allow_unused=True)
        want = torch.autograd.grad(
            naive_recurrence(**made)[which].square().sum(), list(made.values()), allow_unused=True
        )
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, atol=1e-9, rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(KINDS), st.integers(2, 90), st.data())
def test_segments_hand_their_state_over(kind: str, n: int, data: st.DataObject):
    cut, chunk = data.draw(st.integers(1, n - 1)), data.draw(st.integers(1, n))
    made = {name: t.detach() for name, t in tensors(kind, n, b=1, h=2).items()}
    state = made.pop("state")
    head, tail = ({name: t[:, :, s] for name, t in made.items()} for s in (slice(0, cut), slice(cut, None)))
    first, between = call(head | {"state": state}, chunk=chunk)
    rest, last = call(tail | {"state": between}, chunk=chunk)
    whole, end = call(made | {"state": state})
    torch.testing.assert_close(torch.cat((first, rest), dim=2), whole, **TIGHT)
    torch.testing.assert_close(last, end, **TIGHT)


@pytest.mark.parametrize("kind", ["decay", "channels", "gated delta", "kimi delta"])
def test_strong_decays_neither_overflow_nor_cost_digits(kind: str):
    made = {name: t.detach() for name, t in tensors(kind, 150, d=8).items()}
    g = made["log_decay"] * 30
    g[:, :, [5, 70]] = -torch.inf  # nothing before is left
    g[:, :, 71:80] = -1e-3  # and here hardly anything is lost: digits of the sum of logs matter
    made["log_decay"] = g
    single = {name: t.float().requires_grad_() for name, t in made.items()}
    out, state = call(single)
    exact = {name: t.clone().requires_grad_() for name, t in made.items()}
    want, last = naive_recurrence(**exact)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(state.double(), last, atol=2e-5, rtol=2e-5)
    wanted = torch.autograd.grad(want.sum(), [t for name, t in exact.items() if name != "log_decay"])
    found = torch.autograd.grad(out.sum(), list(single.values()))
    assert all(bool(t.isfinite().all()) for t in found)
    for g, w in zip((t for name, t in zip(single, found, strict=True) if name != "log_decay"), wanted, strict=True):
        torch.testing.assert_close(g.double(), w, atol=2e-4, rtol=2e-4)


def test_keys_that_come_again_do_not_cost_digits():
    """Powers of the system would be binomials here, far larger than its inverse."""
    n = 200
    key = normalize(torch.ones(1, 1, n, 8), dim=-1)
    v = torch.randn(1, 1, n, 3, generator=torch.Generator().manual_seed(0))
    for beta in (1.0, 0.3, 2.0):
        steps = torch.full((1, 1, n), beta)
        want, _ = naive_recurrence(*(t.double() for t in (key, key, v)), beta=steps.double())
        out = gated_delta_rule(key, key, v, beta=steps)
        torch.testing.assert_close(out.double(), want, atol=2e-5 * float(want.abs().max()), rtol=0)
    torch.testing.assert_close(gated_delta_rule(key, key, v), v, atol=1e-5, rtol=0)  # β = 1: the last value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["decay", "gated delta"])
def test_half_precision_keeps_a_float32_state(kind: str, dtype: torch.dtype):
    made = {name: t.detach() for name, t in tensors(kind, 100, d=16).items()}
    half = {name: t.to(torch.float32 if name in ("state", "log_decay") else dtype) for name, t in made.items()}
    half = {name: t.requires_grad_() for name, t in half.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = call(half)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    want, last = naive_recurrence(**{name: t.detach().double() for name, t in half.items()})
    torch.testing.assert_close(state.double(), last, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.double(), want, atol=torch.finfo(dtype).eps * float(want.abs().max()), rtol=0)
    (out.float().sum() + state.sum()).backward()
    assert [t.grad.dtype for t in half.values()] == [t.dtype for t in half.values()]


def test_heads_share_queries_and_keys_of_their_group():
    made = {name: t.detach() for name, t in tensors("gated delta", 33, h=4).items()}
    grouped = made | {name: made[name][:, :2] for name in "qk"}
    wide = made | {name: made[name][:, :2].repeat_interleave(2, dim=1) for name in "qk"}
    torch.testing.assert_close(call(grouped)[0], naive_recurrence(**wide)[0], **TIGHT)
    pattern = gated_delta_rule.pattern_of(grouped["q"], grouped["k"], made["v"], made["log_decay"], made["beta"])
    assert (pattern.shape, pattern.grade) == ((2, 4, 33, 33), "frozen")
    plain = gated_linear_attention.pattern_of(grouped["q"], grouped["k"], made["v"])
    assert plain.shape == (2, 4, 33, 33)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_tells_its_pattern_and_what_it_reads_of_a_state(kind: str):
    made = {name: t.detach() for name, t in tensors(kind, 40).items()}
    function = gated_delta_rule if "beta" in made else gated_linear_attention
    given = {name: t for name, t in made.items() if name != "state"}
    pattern = function.pattern_of(**given, initial_state=made["state"], chunk=7, return_state=True)
    assert isinstance(pattern, RecurrentPattern)
    torch.testing.assert_close(pattern.outputs(made["v"]), call(made)[0], **TIGHT)
    whole = naive_recurrent_pattern(*(made[name] for name in "qk"), made.get("log_decay"), made.get("beta"))
    torch.testing.assert_close(pattern.dense(), whole, **TIGHT)
    assert function.pattern_of(**given).before is None


def test_without_decay_it_is_causal_linear_attention_and_recall_of_orthogonal_keys():
    made = inputs("linear", 63)
    v = torch.randn(2, 4, 63, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = gated_linear_attention(made["q"], made["k"], v)
    torch.testing.assert_close(out, (made["q"] @ made["k"].mT).tril() @ v, **TIGHT)
    keys = one_hot(torch.tensor([0, 1, 2, 0]), 3).double()[None, None]
    asked = one_hot(torch.tensor([0, 0, 0, 0]), 3).double()[None, None]
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)[None, None]
    assert gated_delta_rule(asked, keys, values).flatten().tolist() == [1.0, 1.0, 1.0, 4.0]  # the old value is gone
    assert gated_linear_attention(asked, keys, values).flatten().tolist() == [1.0, 1.0, 1.0, 5.0]


def test_against_the_chunked_rule_of_transformers():
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    made = {name: t.detach().float() for name, t in tensors("gated delta", 150, d=16).items()}
    turned = {name: made[name].transpose(1, 2) for name in ("q", "k", "v", "log_decay", "beta")}
    want, last = modeling.torch_chunk_gated_delta_rule(
        turned["q"] * 4, turned["k"], turned["v"], turned["log_decay"], turned["beta"],
        initial_state=made["state"], output_final_state=True,
    )  # fmt: skip
    out, state = call(made)
    torch.testing.assert_close(out, want.transpose(1, 2), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(state, last, atol=2e-4, rtol=2e-4)


def test_what_cannot_be_is_refused():
    made = {name: t.detach() for name, t in tensors("gated delta", 5).items()}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("at most zero", {"log_decay": -made["log_decay"]}),
        ("log_decay must be", {"log_decay": made["log_decay"][..., :3]}),
        ("beta must be", {"beta": made["beta"][:, :2]}),
        ("beta holds nan", {"beta": made["beta"] * torch.nan}),
        ("v must be", {"v": made["v"][0]}),
        ("does not go with", {"v": made["v"][:, :, :4]}),
        ("does not go with", {"v": made["v"].float()}),
        ("v holds nan", {"v": made["v"] * torch.nan}),
        ("q holds nan", {"q": made["q"] * torch.nan}),
        ("must both be", {"k": made["k"][:, :, :3]}),
        ("initial_state must be", {"state": made["state"][:, :, :2]}),
        ("initial_state is torch.float32", {"state": made["state"].float()}),
        ("initial_state holds nan", {"state": made["state"] * torch.nan}),
    ]
    for message, changed in cases:
        with pytest.raises(CaptureError, match=message):
            call(made | changed)
    with pytest.raises(CaptureError, match="chunk is 0"):
        call(made, chunk=0)
